"""Transformers' own models of every family that is read, tiny and with random weights, as a reference."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import transformers as T

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
VISION = dict(**SIZES, intermediate_size=96)
TEXT = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99)
TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


def siglip(**changes):
    return T.SiglipConfig(vision_config=VISION, text_config={**TEXT, **TOKENS}, **changes)


def clip():
    return T.CLIPConfig(vision_config=VISION, text_config={**TEXT, **TOKENS}, projection_dim=20)


MAE = dict(**VISION, mask_ratio=0.0, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
REGISTERS = dict(num_register_tokens=3)


def dinov2_classifier(reads, **settings):
    """DINOv2 whose classifier reads the class token alone, or the mean of the patches alone."""
    if settings:
        model = T.Dinov2WithRegistersForImageClassification(T.Dinov2WithRegistersConfig(**SIZES, **settings))
    else:
        model = T.Dinov2ForImageClassification(T.Dinov2Config(**SIZES))
    model.other_half = slice(48, None) if reads == "token" else slice(48)
    return model


PLAIN = dict(**VISION, num_labels=3)
CASES = {
    "ViT": lambda: T.ViTModel(T.ViTConfig(**VISION), add_pooling_layer=False),
    "ViT with a head": lambda: T.ViTForImageClassification(T.ViTConfig(**PLAIN)),
    "ViT with a pooler": lambda: T.ViTModel(T.ViTConfig(**VISION, pooler_output_size=20)),
    "DeiT with two heads": lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**PLAIN)),
    "MAE": lambda: T.ViTMAEModel(T.ViTMAEConfig(**MAE)),
    "MAE with its decoder": lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**MAE)),
    "DINOv2": lambda: T.Dinov2Model(T.Dinov2Config(**SIZES)),
    "DINOv2 giant": lambda: T.Dinov2Model(T.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "DINOv2 with registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**SIZES, **REGISTERS)),
    "DINOv2 with a classifier of the class token": lambda: dinov2_classifier("token"),
    "DINOv2 with registers and a classifier of the mean": lambda: dinov2_classifier("mean", **REGISTERS),
    "DINOv3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, **REGISTERS)),
    "DINOv3 without registers": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**VISION, key_bias=True)),
    "DINOv3 plus": lambda: T.DINOv3ViTModel(
        T.DINOv3ViTConfig(**VISION, **REGISTERS, use_gated_mlp=True, hidden_act="silu")
    ),
    "CLIP": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)),
    "CLIP with exact GELU": lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION, hidden_act="gelu")),
    "CLIP with its projection": lambda: T.CLIPVisionModelWithProjection(
        T.CLIPVisionConfig(**VISION, projection_dim=20)
    ),
    "CLIP with its text tower": lambda: T.CLIPModel(clip()),
    "CLIP with a classifier": lambda: T.CLIPForImageClassification(clip()),
    "SigLIP": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION)),
    "SigLIP with pixels beyond the last patch": lambda: T.SiglipVisionModel(
        T.SiglipVisionConfig(**VISION | {"image_size": 35})
    ),
    "SigLIP without its head": lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION, vision_use_head=False)),
    "SigLIP with its text tower": lambda: T.SiglipModel(siglip()),
    "SigLIP with a classifier": lambda: T.SiglipForImageClassification(siglip(num_labels=3)),
}


def output(model, images, *, pooler=True):
    """What our model gives: logits, an image's embedding, the pooled feature, or the class token."""
    with torch.no_grad():
        if isinstance(model, T.CLIPModel):
            return model.visual_projection(model.vision_model(images).pooler_output).numpy()
        if isinstance(model, T.SiglipModel | T.ViTMAEForPreTraining):
            return output(getattr(model, "vit", None) or model.vision_model, images)
        found = model(images)
    for name in ("logits", "image_embeds", *(["pooler_output"] if pooler else [])):
        if found.get(name) is not None:
            return found[name].numpy()
    tokens = found.last_hidden_state
    return (tokens.mean(dim=1) if isinstance(model, T.SiglipVisionModel) else tokens[:, 0]).numpy()


def randomised(model):
    """The model with weights that are nowhere 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(
                0.2 * noise + name.endswith(("weight", "lambda1"))
                if p.ndim < 2
                else noise * max(p[0].numel(), 1) ** -0.5
            )
        if hasattr(model, "other_half"):
            model.classifier.weight[:, model.other_half] = 0
    return model.eval()
