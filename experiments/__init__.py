"""Run, record and plot the papers' experiments."""
