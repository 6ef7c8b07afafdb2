"""What a run will need of memory and of U-Net evaluations, before weights are loaded: the sum of what owners report.
Not here: the bytes of an engine, a method or a buffer, which are in their own packages, or anything that is measured.

    from fastunlearn.models.description import describe_model
    from fastunlearn.planning.plan import make_plan
    plan = make_plan(config, 1, describe_model(config))
"""
