"""From the numbers of an evaluation to pages: tables, legends, plots, Markdown and one HTML file.

In comes the report's JSON value; out come texts and pictures. It draws and scores nothing, and imports no other
room.
"""
