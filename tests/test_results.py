"""Results kept in the project: what was written comes back, and nothing is kept without its origin."""

import numpy as np
import pytest
import xarray as xr

from hmlab import results
from hmlab.registry import UnknownName


def test_round_trip_keeps_numbers_labels_units_and_provenance(tmp_path, monkeypatch):
    values = np.array([[1.5, np.nan, 1 / 3], [np.nan, np.nan, 1_072_193.0]])
    units = {"units": "nats/token"}
    written = xr.Dataset({"loss": (("run", "step"), values, units)}, coords={"run": ["a", "b"], "step": [1, 2, 3]})
    results.save("curve", written, {"commit": "abc"}, folder=tmp_path)
    read = results._read(tmp_path, "curve")
    np.testing.assert_array_equal(read["loss"].sel(step=[1, 3]), values[:, [0, 2]])
    assert 2 not in read["step"]  # nothing was measured there
    assert read["loss"].attrs == units and read.attrs["provenance"] == {"commit": "abc"}


def test_no_provenance_no_result(tmp_path):
    with pytest.raises(ValueError, match="provenance"):
        results.save("curve", xr.Dataset({"loss": ("step", [1.0])}, coords={"step": [1]}), {}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_kept_result_says_where_it_comes_from():
    for name in results.names():
        provenance = results.load(name).attrs["provenance"]
        assert {"commit", "versions", "device", "command"} <= set(provenance), name


def test_unknown_result_is_named_with_near_misses():
    with pytest.raises(UnknownName, match="lmn_table1"):
        results.published("lmn_table")
