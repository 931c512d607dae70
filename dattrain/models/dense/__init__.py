"""Dense prediction: backbones that give maps at strides 4 to 32, and the heads on them.

``create_backbone`` makes DAT, DAT++, and timm's Swin and PVT v2 one interface; ``create_segmenter`` puts Semantic FPN or UperNet on
it, ``create_detector`` RetinaNet or one of the R-CNNs. ``weights.initialise`` fills a model from a classification or a dense training. What is made of outputs is in ``dattrain.tasks``.
"""

from dattrain.models.dense.backbone import Backbone, create_backbone
from dattrain.models.dense.create_detector import create_detector
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter, create_segmenter

__all__ = ["Backbone", "Detector", "Segmenter", "create_backbone", "create_detector", "create_segmenter"]
