import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from anomalib_decad.components import EncoderWeightsError, ViTEncoder


@pytest.fixture(scope="module")
def encoder():
    return ViTEncoder("test_vit", [1, 3], pretrained=False)


def test_returns_patch_tokens_of_the_layers(encoder):
    images = torch.randn(2, 3, 32, 48)
    full = timm.create_model("test_vit", pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    full.load_state_dict({**full.state_dict(), **encoder.vit.state_dict()})
    with torch.no_grad():
        expected = full.forward_intermediates(images, indices=[0, 2], output_fmt="NLC", intermediates_only=True)
    outputs = encoder(images)
    assert [tuple(output.shape) for output in outputs] == [(2, 6, 64)] * 2
    torch.testing.assert_close(outputs, expected)
    assert len(encoder.vit.blocks) == 3
    assert isinstance(encoder.vit.norm, torch.nn.Identity)


def test_is_frozen_in_eval_mode_and_without_gradient(encoder):
    encoder.train()
    assert not any(module.training for module in encoder.vit.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 32, 32, requires_grad=True))[0].requires_grad


def test_image_of_odd_size_is_refused_with_a_good_one(encoder):
    with pytest.raises(ValueError, match="multiples of its patch of 16 x 16 pixels, got 40 x 100; 32 x 96 would do"):
        encoder(torch.randn(1, 3, 40, 100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((("test_vit", layers), "increasing numbers from 1 to 6") for layers in ([], [0, 1], [2, 1], [1, 1], [1, 7])),
        *(((name, [1]), "no vision transformer") for name in ("resnet18", "test_resnet")),
        (("vit_base_patch14_dinov22", [1]), "close names are .*vit_base_patch14_dinov2"),
        (("test_vit", [1], "nowhere.pth"), "no such file: nowhere.pth"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ViTEncoder(*arguments)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch8_224", "vit_small_patch16_224"])
def test_other_patches_and_register_tokens(name):
    encoder = ViTEncoder(name, [1, 2], pretrained=False)
    patch = encoder.patch_size[0]
    outputs = encoder(torch.randn(1, 3, 2 * patch, 3 * patch))
    assert [tuple(output.shape) for output in outputs] == [(1, 6, 384)] * 2


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights(tmp_path, encoder_weights, suffix):
    path = tmp_path / f"weights{suffix}"
    state = load_file(encoder_weights)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    encoder = ViTEncoder("test_vit", [1, 3], path)
    encoder.load_weights()
    torch.testing.assert_close(encoder.vit.blocks[2].mlp.fc1.weight.data, state["blocks.2.mlp.fc1.weight"])
    with pytest.raises(EncoderWeightsError, match=f"weights{suffix} holds no weights of the encoder vit_small"):
        ViTEncoder("vit_small_patch16_224", [1], path)(torch.randn(1, 3, 32, 32))


def test_local_weights_in_the_original_names_of_dinov2(tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    timm_state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    original = dict(timm_state)
    # The original has a mask token, and position embeddings for the class token.
    original["mask_token"] = torch.zeros(1, 384)
    original["register_tokens"] = original.pop("reg_token")
    original["pos_embed"] = torch.cat([torch.full((1, 1, 384), 0.5), original["pos_embed"]], dim=1)
    path = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(original, path)
    encoder = ViTEncoder(name, [1], path)
    encoder.load_weights()
    torch.testing.assert_close(encoder.vit.cls_token.data, timm_state["cls_token"] + 0.5)
    torch.testing.assert_close(encoder.vit.reg_token.data, timm_state["reg_token"])


def test_without_the_hub_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = ViTEncoder("test_vit", [1])
    with pytest.raises(EncoderWeightsError) as error:
        encoder.load_weights()
    assert all(part in str(error.value) for part in ("test_vit", "encoder_weights", "HF_HUB_OFFLINE"))
    assert "\n" not in str(error.value)


def test_state_dict_makes_the_weights_unnecessary():
    source = ViTEncoder("test_vit", [1, 3], pretrained=False)
    encoder = ViTEncoder("test_vit", [1, 3])
    encoder.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(images), source(images))


def test_a_state_dict_without_the_encoder_leaves_its_weights_wanted():
    """As that of the trained parts alone."""
    model = torch.nn.ModuleDict({"encoder": ViTEncoder("test_vit", [1, 3]), "head": torch.nn.Linear(2, 2)})
    whole = model.state_dict()
    own = {name: value for name, value in whole.items() if not name.startswith("encoder.")}
    model.load_state_dict(own, strict=False)
    assert model["encoder"]._pending
    model.load_state_dict(whole)
    assert not model["encoder"]._pending


def test_downloading_weights_uses_no_random_numbers(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **{**kwargs, "pretrained": False}))
    encoder = ViTEncoder("test_vit", [1, 3])
    state = torch.get_rng_state()
    encoder.load_weights()
    assert torch.equal(torch.get_rng_state(), state)
