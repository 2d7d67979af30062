"""Generate impressions whose click probabilities are known."""

from hashemb.ctr.synthetic.stream import Impressions, ImpressionStream, truth_path
from hashemb.ctr.synthetic.writers import replacing

__all__ = ["ImpressionStream", "Impressions", "replacing", "truth_path"]
