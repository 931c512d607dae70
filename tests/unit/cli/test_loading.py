import subprocess
import sys

BLOCKED = "import sys; sys.modules['torch'] = None; from dattrain.cli.main import main; main(sys.argv[1:])"


def test_a_start_says_what_takes_its_time_before_it_does(tmp_path):
    """Where torch cannot even be imported the line is there already; it is the first."""
    command = [sys.executable, "-c", BLOCKED, "train", "demo/pretrain", "--run", str(tmp_path / "run")]
    for rank, said in (("0", True), ("1", False)):
        environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "PATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "ModuleNotFoundError" in done.stderr
        assert done.stderr.startswith("loading torch, DeepSpeed ...\n") == said, done.stderr
        assert done.stderr.count("loading") == said
