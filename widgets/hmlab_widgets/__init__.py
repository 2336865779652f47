"""Views and dashboards: a Dataset goes in, a selection comes out."""
