"""Results of many students: rows and differences (`results`), as Markdown and as a picture; the list of methods."""
