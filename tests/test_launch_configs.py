"""The launch files under examples/launch mean to Accelerate, Slurm and the training script what they say."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import timm
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from cyclekd import wrap_multicycle
from cyclekd.integrations.deit.train import parse_arguments

LAUNCH = Path(__file__).parents[1] / "examples/launch"
SLURM = LAUNCH / "train_deit.slurm"
KINDS = {
    "gpus.yaml": DistributedType.MULTI_GPU,
    "nodes.yaml": DistributedType.MULTI_GPU,
    "fsdp2.yaml": DistributedType.FSDP,
    "deepspeed.yaml": DistributedType.DEEPSPEED,
}


def load(name: str) -> ClusterConfig:
    return load_config_from_file(str(LAUNCH / name))


def launched(name: str, *arguments: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a config and its own arguments."""
    parsed = launch_command_parser().parse_args(["--config_file", str(LAUNCH / name), *arguments, "train.py"])
    return _validate_launch_command(parsed)[0]


def test_there_is_a_test_for_every_config() -> None:
    assert {path.name for path in LAUNCH.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_config_loads_as_what_it_is_for(name: str) -> None:
    config = load(name)
    assert config.distributed_type == KINDS[name] and config.mixed_precision == "bf16"
    assert config.num_processes % config.num_machines == 0
    args = launched(name)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == tuple(
        kind == KINDS[name] for kind in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_key_is_one_that_accelerate_launch_knows(name: str) -> None:
    config, known = load(name), vars(launch_command_parser().parse_args(["train.py"]))
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= set(known)


def test_several_nodes_get_their_shares_and_find_the_head_node() -> None:
    args = launched("nodes.yaml", "--machine_rank", "1", "--main_process_ip", "head", "--num_processes", "8")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "4", 1)
    assert args.rdzv_endpoint == "head:29500"


def test_fsdp2_shards_every_block_of_a_wrapped_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in prepare_multi_gpu_env(launched("fsdp2.yaml")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    model = wrap_multicycle(timm.create_model("deit_tiny_patch16_224", img_size=32, depth=3))
    plugin.set_auto_wrap_policy(model)
    sharded = [
        name
        for name, module in model.named_modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    ]
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert sharded == ["blocks.0", "blocks.1", "blocks.2"]


def test_deepspeed_leaves_accumulation_to_the_recipe() -> None:
    args = launched("deepspeed.yaml")
    assert (args.zero_stage, args.gradient_accumulation_steps) == (2, None)


@pytest.mark.parametrize("name", KINDS)
def test_the_command_in_a_config_is_one_that_both_programs_take(name: str) -> None:
    comments = "".join(re.findall(r"^#(.*\n)", (LAUNCH / name).read_text(), re.M)).replace("\\\n", " ")
    (command,) = re.findall(r"^ +(accelerate launch .*)$", comments, re.M)
    words = shlex.split(command)
    script = words.index("examples/train_deit.py")
    assert launch_command_parser().parse_args(words[2 : script + 1]).config_file == f"examples/launch/{name}"
    assert str(parse_arguments("", words[script + 1 :]).out)


# -- Slurm -------------------------------------------------------------------------------------------------------------

COMMANDS = {  # two nodes, one after the other; a training that is stopped after writing a checkpoint
    "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@" || failed=$?; done; exit "${failed:-0}"',
    "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "scontrol $*"; fi',
    "accelerate": 'printf "%s\\n" "$*"; eval "$TRAINING"',
}


@pytest.fixture
def submit(tmp_path: Path):
    """Run the batch script with stand-ins for Slurm's commands and Accelerate; `training` is what the latter does."""
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"JOB_NODELIST": "node[1-2]", "GPUS_ON_NODE": "4", "NNODES": "2", "JOB_ID": "12345"}

    def run(training: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "TRAINING": training,
            **{f"SLURM_{name}": value for name, value in slurm.items()},
        }
        command = ["bash", str(SLURM), "data", str(tmp_path / "my run"), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_the_batch_script_is_valid_and_asks_for_what_a_resume_needs() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    asked = re.findall(r"^#SBATCH (\S+)$", SLURM.read_text(), re.M)
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(asked)


def test_every_node_is_launched_with_its_rank_and_the_training_resumes(submit) -> None:
    first, second = submit("true", "--cycles", "2", "--batch-size", "128").stdout.splitlines()
    assert first.replace("--machine_rank 0", "--machine_rank 1") == second
    words = shlex.split(first)
    script = words.index("examples/train_deit.py")
    launch = launch_command_parser().parse_args(words[1 : script + 1])
    assert (launch.num_machines, launch.num_processes, launch.main_process_ip) == (2, 8, "node1")
    assert (launch.machine_rank, launch.main_process_port) == (0, 22345)
    assert words[script + 1 : script + 3] == ["--data", "data"]
    assert words[-5:] == ["--resume", "--cycles", "2", "--batch-size", "128"]


def test_a_job_that_got_further_is_queued_again_and_no_other(submit, tmp_path: Path) -> None:
    checkpoint = 'mkdir -p "$TMP/my run/checkpoints/step-{}"'.replace("$TMP", str(tmp_path))
    finish = f'mkdir -p "{tmp_path}/my run/model" && touch "{tmp_path}/my run/model/model.safetensors"'
    failed = submit("exit 2")
    assert failed.returncode == 2 and "requeue" not in failed.stdout
    stopped = submit(checkpoint.format("00000007") + "; exit 1")
    assert "scontrol requeue 12345" in stopped.stdout
    assert "requeue" not in submit("exit 1").stdout  # no step further: it would fail for ever
    finished = submit(f"{checkpoint.format('00000009')}; {finish}")
    assert finished.returncode == 0 and "requeue" not in finished.stdout
