"""Say what the logs show: tables, figures, and the rows and lines of the documents; nothing here is typed by hand."""
