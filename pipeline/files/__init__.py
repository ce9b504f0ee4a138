"""What lies below ``storage``: filesystems' errors as sentences, unfinished files of a local disk, the Hub's cache.

In come paths and what a filesystem raised; out come facts about files. It knows no URI scheme but the Hub's.
"""
