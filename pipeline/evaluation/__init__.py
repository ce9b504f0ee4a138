"""From samplers and real images to the numbers of a report.

In come images by sample id; out come mergeable statistics, scores with their errors, and times. It knows neither how a
report looks nor on how many actors the images are drawn.
"""
