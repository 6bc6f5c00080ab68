"""The encoders that give pyramids, and the choice among them."""

import pytest
import timm
import torch

from anomalib_decad.components import create_encoder
from anomalib_decad.components.encoders import CNNEncoder, ViTPyramid, check_name


def test_a_convolutional_network_gives_its_stages():
    cnn = CNNEncoder("test_resnet", [1, 2, 3], pretrained=False)
    maps = cnn(torch.rand(2, 3, 64, 96))
    assert list(maps) == [1, 2, 3]
    for feature, channels, stride in zip(maps.values(), cnn.channels, cnn.strides, strict=True):
        assert tuple(feature.shape) == (2, channels, 64 // stride, 96 // stride)
    assert cnn.finest_stride == min(cnn.strides)
    assert not any(parameter.requires_grad for parameter in cnn.parameters())
    assert not cnn.train().cnn.training


def test_its_outputs_are_timms(weights_of):
    encoder = CNNEncoder("test_resnet", [1, 2, 3], weights_of("test_resnet"))
    images = torch.rand(1, 3, 64, 64)
    network = timm.create_model("test_resnet", pretrained=False, features_only=True, out_indices=(1, 2, 3)).eval()
    encoder.load_weights()
    network.load_state_dict(encoder.cnn.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(list(encoder(images).values()), network(images))


def test_a_transformer_gives_a_pyramid():
    encoder = ViTPyramid("test_vit", [1, 2, 3], pretrained=False, channels=[8, 64, 128])
    maps = list(encoder(torch.rand(2, 3, 64, 128)).values())
    assert [tuple(feature.shape) for feature in maps] == [(2, 8, 8, 16), (2, 64, 4, 8), (2, 128, 2, 4)]
    assert encoder.finest_stride == 8
    again = ViTPyramid("test_vit", [1, 2, 3], pretrained=False, channels=[8, 64, 128])
    torch.testing.assert_close(encoder.projection0, again.projection0)  # fixed, not random
    identity = encoder.projection1.mT @ encoder.projection1
    torch.testing.assert_close(identity, torch.eye(len(identity)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "cls", "size", "message"),
    [
        ("test_resnet", CNNEncoder, (64, 70), "multiples of 32 pixels, got 64 x 70; 64 x 64 would do"),
        ("test_vit", ViTPyramid, (64, 80), "multiples of 64 pixels, got 64 x 80; 64 x 64 would do"),
    ],
)
def test_the_name_chooses_the_kind_which_checks_sizes(name, cls, size, message, weights_of):
    encoder = create_encoder(name, [1, 2, 3], weights_of(name), (1, 2, 3), (8, 16, 32))
    assert isinstance(encoder, cls)
    encoder.check(64, 64)
    encoder.fuse(64, 64)
    assert len(encoder(torch.rand(1, 3, 64, 64))) == 3
    with pytest.raises(ValueError, match=message):
        encoder.check(*size)


def test_names():
    assert check_name("timm/vit_base_patch14_dinov2.lvd142m") == "vit_base_patch14_dinov2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test_resnet", [1, 9]), r"no network 'test_resnet' with the stages \[1, 9\]"),
        (("test_vit", [1, 2]), "layers must be 3 layers of test_vit"),
        (("resnet1", [1, 2, 3]), "timm has no model 'resnet1'; close names are"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_encoder(*arguments, weights=None, stages=(1, 2, 3), channels=(8, 16, 32))
