"""Old names of modules and of what is in them: they work and warn until 0.3."""

import importlib
import subprocess
import sys
import types
import warnings

import pytest

from diffusers_adm import deprecations


# The functions, classes and choices of the modules that have moved, as they were before (commit 1e81732).
OLD_NAMES = {
    "command_line": "CommandError add_debug_argument fail is_mistake run_command",
    "conditions": "CONDITIONS color_blocks edges low_resolution make_condition regions",
    "finiteness": "explain_not_finite not_finite",
    "guidance": "exact_prediction guide log_probability_gradient shift_prediction signal_and_std",
    "image_inputs": "ImageInput OneImage read_conditions read_images read_masks",
    "inpainting": "known_channels resampling_walk",
    "model_cards": "LoraAdapter write_model_card",
    "noise_schedules": """
        BetaSchedule alphas_cumprod_of check_same_noise describe_noise_schedule is_same_noise make_betas
        noise_schedule_of rescale_zero_terminal_snr
    """,
    "registration": "PUBLIC_CLASSES register_with_diffusers",
    "space": "build_wheel find_clone push_space",
    "super_resolution": "add_noise_to_low_res enlarge match_low_res noise_level_embedding shrink",
    "text_encoding": """
        TextConditioning check_text_encoder cross_attention_width cut_off encode_tokens join_texts map_text
        max_prompt_length pads_to_max text_model_kwargs tokenize
    """,
    "training.captions": """
        CaptionEmbeddings CaptionTokens Captions build_text_encoder drop_captions encode_captions
        freeze_unused_parameters load_text_encoder load_tokenizer stored_conditioning text_encoder_class
    """,
    "training.classification": """
        BalancedClassSampler ClassificationMetrics fit_classifier_head load_id2label match_classes
        match_classifier_classes plot_accuracy_by_timestep plot_classifier_curves save_id2label timestep_bin_edges
    """,
    "training.conditioning": "caption_model_kwargs load_text prepare_captions",
    "training.control": "ControlDataset",
    "training.data": """
        EpochShuffleSampler ImageDataset UnusableImageError check_batch_fits check_column check_images
        decode_condition decode_rgb load_image_dataset load_source read_captions renumber_labels
    """,
    "training.fingerprints": "FrozenNetworks hash_config hash_plain hash_tensors hash_tokenizer",
    "training.masks": "InpaintingDataset random_known",
    "training.publication": "prepare_repository push_result run_settings",
    "training.repositories": "check_can_be_written from_subfolder_or_root reading",
    "training.seeding": "derive_seed seed_step",
    "training.steps": "AfterStep Due record_losses",
}


@pytest.mark.parametrize("module", OLD_NAMES)
def test_every_old_name_is_found_and_warns(module):
    old = importlib.import_module(f"diffusers_adm.{module}")
    for name in OLD_NAMES[module].split():
        with pytest.warns(FutureWarning, match=rf"^`diffusers_adm\.{module}\.{name}` is now `(.*)`\.") as caught:
            value = getattr(old, name)
        (warning,) = caught
        assert warning.filename == __file__  # of the caller
        new_module, _, new_name = str(warning.message).split("`")[3].rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert getattr(importlib.import_module(new_module), new_name) is value


def test_every_moved_module_has_its_new_places():
    for old, places in deprecations.MOVED_MODULES.items():
        assert old in OLD_NAMES or old == "publishing"  # whose classes were bases of others only
        for place in places:
            importlib.import_module(f"diffusers_adm.{place}")


def test_each_way_of_importing():
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from diffusers_adm.guidance import guide
    from diffusers_adm import text_encoding
    import diffusers_adm.training.seeding as seeding
    assert seeding.derive_seed and text_encoding.TextConditioning
found = [str(w.message).split("`")[1] for w in caught if "diffusers_adm" in str(w.message)]
assert found == ["diffusers_adm." + name for name in
    ("guidance.guide", "training.seeding.derive_seed", "text_encoding.TextConditioning")], found
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_unknown_names_and_modules():
    with pytest.raises(AttributeError, match="module 'diffusers_adm.guidance' has no attribute 'nothing'"):
        _ = importlib.import_module("diffusers_adm.guidance").nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("diffusers_adm.nowhere")


def test_renamed_in_a_module_that_has_moved(monkeypatch):
    """One warning, with the newest place and name."""
    new = types.ModuleType("diffusers_adm.toy_place")
    new.better = object()
    new.__getattr__ = deprecations.renamed(new.__name__, {"worse": "better"})
    monkeypatch.setitem(sys.modules, new.__name__, new)
    monkeypatch.setitem(deprecations.MOVED_MODULES, "toy", ("toy_place",))
    with pytest.warns(
        FutureWarning, match="`diffusers_adm.toy.worse` is now `diffusers_adm.toy_place.better`"
    ) as caught:
        assert importlib.import_module("diffusers_adm.toy").worse is new.better
    assert len(caught) == 1
    with pytest.warns(FutureWarning, match="`diffusers_adm.toy_place.worse` is now `diffusers_adm.toy_place.better`"):
        assert new.worse is new.better
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = new.other
    del sys.modules["diffusers_adm.toy"], deprecations._RENAMED[new.__name__]


def test_finding_twice_changes_nothing():
    before = list(sys.meta_path)
    deprecations.find_moved_modules()
    assert sys.meta_path == before
