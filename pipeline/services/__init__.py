"""What runs around the jobs: Ray (connection, actors, heartbeat, errors) and MLflow (runs, store, registry).

In come a recipe and work to do; out come results or one sentence. It does not know what the work is about.
"""
