"""Planning: what a run will need of memory and of U-Net evaluations, before any weights are loaded.

    from fastunlearn.models.description import describe_model
    from fastunlearn.planning.plan import make_plan
    plan = make_plan(config, 1, describe_model(config))

Nothing is measured here, and nothing here is imported by the update loop.
"""
