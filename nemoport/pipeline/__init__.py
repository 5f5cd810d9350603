"""`build`: a file of models becomes a repository.

    document   text    -> data, checked against a schema, every complaint with its line
    recipe     data    -> models, matrices expanded, paths resolved
    plan       models  -> steps, each known by what goes into it
    run        steps   -> done, or found done before
    summary    what was done, as Markdown for a pull request

A converted artifact lies in the cache under the fingerprint of its job, so the same inputs are never converted twice,
and a killed build continues. Publishing, validating and promoting know by themselves what was done.
"""

from nemoport.pipeline.plan import Need, Planned, need, plan
from nemoport.pipeline.recipe import Joined, Pipeline, read
from nemoport.pipeline.run import Outcome, run
from nemoport.pipeline.summary import markdown

__all__ = ["Joined", "Need", "Outcome", "Pipeline", "Planned", "markdown", "need", "plan", "read", "run"]
