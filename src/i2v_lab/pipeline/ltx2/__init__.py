"""LTX-2.3 through ltx-core and ltx-pipelines; the only package that imports them."""
