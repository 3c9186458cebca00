"""The ImageNet head: the published logits, losses and predictions in mmpretrain's classifier."""

import pytest
import torch
from common.plain_conv2former import plain_conv2former, plain_head
from helpers.comparisons import SMALL_ARCHS, compare, leaves, randomized, relative_error
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

import mmconv2former
from mmconv2former import Conv2Former
from mmconv2former.models.cls_head import Conv2FormerClsHead


def test_equals_plain_implementation_in_float64():
    head = randomized(Conv2FormerClsHead(in_channels=6, num_classes=5, hidden_channels=12).double())
    x = torch.randn(2, 6, 3, 4).double()
    state = leaves(head)
    compare(head, [head((x,))], [plain_head(x, state)], state, 1e-12, 1e-11)


def test_logits_of_the_published_architecture():
    """Backbone and head together, of the real widths."""
    backbone = randomized(Conv2Former('nano', out_indices=3, out_norm=False)).eval()
    head = randomized(Conv2FormerClsHead(in_channels=512, num_classes=1000)).eval()
    assert {name.split('.')[0] for name in head.state_dict()} == {'head', 'pred'}
    assert head.head[0].weight.shape == (1280, 512, 1, 1)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = plain_conv2former(x, backbone.state_dict(), backbone.depths)[-1]
        expected = plain_head(features, head.state_dict())
        assert relative_error(head(backbone(x)), expected) < 1e-5


def test_trains_and_predicts_in_a_classifier():
    init_default_scope('mmpretrain')
    backbone = dict(type='mmconv2former.Conv2Former', arch=SMALL_ARCHS['narrow'], out_indices=(3,))
    head = dict(type='Conv2FormerClsHead', in_channels=20, num_classes=7, cal_acc=True, topk=(1, 3))
    classifier = randomized(
        MODELS.build(dict(type='ImageClassifier', backbone=backbone, head=head))
    )
    images = torch.randn(4, 3, 64, 64)
    samples = [DataSample().set_gt_label(label) for label in (0, 3, 6, 2)]
    losses = classifier(images, samples, mode='loss')
    logits = classifier(images, mode='tensor')
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6, 2]))
    torch.testing.assert_close(losses['loss'], expected)
    assert set(losses) == {'loss', 'accuracy_top-1', 'accuracy_top-3'}
    losses['loss'].backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    classifier.eval()
    predictions = classifier(images, samples, mode='predict')
    scores = classifier(images, mode='tensor').softmax(1)
    for prediction, score in zip(predictions, scores):
        torch.testing.assert_close(prediction.pred_score, score)
        assert prediction.pred_label.item() == score.argmax().item()


def test_is_an_attribute_of_the_package():
    assert mmconv2former.Conv2FormerClsHead is Conv2FormerClsHead
    with pytest.raises(AttributeError, match="has no attribute 'Swin'"):
        _ = mmconv2former.Swin


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(in_channels=0), ValueError, 'in_channels must be at least 1, got 0'),
        (dict(in_channels=8, num_classes=2.5), TypeError, 'num_classes must be an int .* got 2.5'),
    ],
)
def test_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv2FormerClsHead(**arguments)


def test_features_of_another_backbone_are_refused():
    head = Conv2FormerClsHead(in_channels=6, num_classes=5)
    with pytest.raises(ValueError, match=r'\(N, in_channels=6, H, W\), got \(2, 5, 3, 3\)'):
        head((torch.randn(2, 5, 3, 3),))
