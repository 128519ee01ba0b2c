"""Notebooks executed headlessly: parameters, stamps, execution, report."""
