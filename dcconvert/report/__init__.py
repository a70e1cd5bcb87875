"""Reports: the HTML pages, their plots and their figures."""
