"""Pictures of a model and of what it does: arrays first, and the pictures that a notebook shows of them."""

from tinyvit.viz.figures import Figure as Figure
from tinyvit.viz.figures import attention as attention
from tinyvit.viz.figures import attention_distance as attention_distance
from tinyvit.viz.figures import calibration as calibration
from tinyvit.viz.figures import confusion as confusion
from tinyvit.viz.figures import curves as curves
from tinyvit.viz.figures import features as features
from tinyvit.viz.figures import filters as filters
from tinyvit.viz.figures import position_similarity as position_similarity
from tinyvit.viz.figures import predictions as predictions
from tinyvit.viz.figures import rollout as rollout
