"""The proof: an artifact is executed as its runtime would and compared with the source checkpoint.

The source is executed by the reference, in float32, with its weights rounded to the artifact's dtype, so that what is
measured is the export and not the rounding. What the artifact's files say, config included, is all that its side knows.
"""

from nemoport.validation import documents
from nemoport.validation.report import Report, Section, Summary
from nemoport.validation.repository import run
from nemoport.validation.validate import Request, validate

__all__ = ["Report", "Request", "Section", "Summary", "documents", "run", "validate"]
