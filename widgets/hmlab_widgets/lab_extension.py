"""A Jupyter server extension: Panel's own files under the lab's address, so that notebooks ask no other host.

Without it `pn.extension()` loads scripts and styles from elsewhere, and draws nothing without a network.
"""

import os

import simpervisor.atexitasync
from jupyter_server.base.handlers import AuthenticatedFileHandler
from jupyter_server.serverapp import ServerApp
from jupyter_server.utils import url_path_join
from panel.io.resources import DIST_DIR

from hmlab.child import end_with_parent


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "hmlab_widgets.lab_extension"}]


def _load_jupyter_server_extension(server: ServerApp) -> None:
    end_with_parent()
    # The first proxied dashboard would put simpervisor's signal handlers in the place of Jupyter's, and a
    # stop would then exit at once and leave kernels behind.
    simpervisor.atexitasync.signal_handler_set = True

    root = url_path_join(server.base_url, "hmlab/panel/")
    # Panel looks below its root for <version>/dist/.
    pattern = url_path_join(root, r"[^/]+/dist/(.*)")
    server.web_app.add_handlers(".*", [(pattern, AuthenticatedFileHandler, {"path": str(DIST_DIR)})])
    # Kernels inherit these.
    os.environ["PANEL_CDN_ROOT"] = f"http://{server.ip}:{server.port}{root}"
    os.environ["PANEL_INLINE"] = "true"
