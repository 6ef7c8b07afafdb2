"""Planning: what a run will need of memory and of U-Net evaluations, before any weights are loaded.

    from fastunlearn.planning.plan import make_plan, read_model
    plan = make_plan(config, 1, read_model(config))

Nothing is measured here, and nothing here is imported by the update loop.
"""
