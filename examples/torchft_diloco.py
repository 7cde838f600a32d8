"""torchft's DiLoCo with sparse pseudo-gradients: replicas that may die and come back, over a slow link.

    python examples/torchft_diloco.py              a lighthouse and two replicas on this machine, each a process on its CPU
    python examples/torchft_diloco.py --kill       the same; replica 1 is killed within an average, starts again and recovers

One replica of several hosts, with torchft_lighthouse --min_replicas 1 running on one of them:

    python examples/torchft_diloco.py --lighthouse http://HOST:29510 --replica 0 --host $(hostname)

It was written for torchft 0.2.0. What a script of your own needs of it is SparseManager.
"""

import argparse
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager
from torchft.process_group import ProcessGroup, create_store_client

import regtopk_torch as rt


class SparseManager(Manager):
    """torchft's Manager whose averages of pseudo-gradients are those of a state, for DiLoCo(..., use_bucketization=True).

    What a replica holds back stays with it when others come and go. Where a round does not count, because `should_commit` says no,
    what the replica sent in it is held back again. A replica that recovers takes the weights of the others and holds nothing back.

    Args:
        state (TopKState or RegTopKState): of this replica; the manager gives it the group of each quorum.
        fragments (int): how many DiLoCo has. Each holds back its own.
        arguments: those of Manager, but for `pg`.
    """

    def __init__(self, state, *, fragments=1, timeout=datetime.timedelta(seconds=60), **arguments):
        self.state, self._fragments = state, fragments
        self._members, self._group, self._begun = _Members(timeout), None, False
        self._bytes = {"bytes_sent": 0.0, "bytes_dense": 0.0}  # in the groups of before
        super().__init__(pg=self._members, timeout=timeout, use_async_quorum=False, **arguments)
        self.register_state_dict_fn("regtopk_torch", lambda _: self.state.reset(), dict)

    def allreduce(self, tensor, should_quantize=False, reduce_op=dist.ReduceOp.AVG):
        """Average a flat buffer of pseudo-gradients in place. As Manager's it reports errors instead of raising them."""
        work = _Work(self)
        if self.errored():
            return work
        try:
            self.wait_quorum()
            if self._group is not self._members.group:
                self._bytes = self.bytes()
                self._group = self._members.group
                self.state.regroup(self._group, step=self.current_step())
            name = f"fragment {self.current_step() % self._fragments}"
            work.average = self.state.average([tensor], [name], out=[tensor], async_op=True)
            self._begun = True
        except Exception as error:
            self.report_error(error)
        return work

    def should_commit(self, timeout=None):
        commits = super().should_commit(timeout)
        if self._begun:
            self._begun = False
            (self.state.commit if commits else self.state.abort)()
        return commits

    def bytes(self):
        """What this replica has put on the network, and what a ring all-reduce of all entries would have."""
        return {name: before + self.state.stats()[name] for name, before in self._bytes.items()}


class _Members(ProcessGroup):
    """The group of the quorum, in the place of torchft's process groups: the state opens what it needs on its store."""

    def __init__(self, timeout):
        super().__init__(0, 1)
        self._timeout, self.group = timeout, None

    def configure(self, store_addr, replica_id, rank, world_size, *_, **__):
        self.group = dist.ProcessGroup(create_store_client(store_addr, timeout=self._timeout), rank, world_size)


class _Work:
    """An average that DiLoCo waits for."""

    def __init__(self, manager):
        self.average, self._manager, self._future = None, manager, torch.futures.Future()

    def wait(self, timeout=None):
        try:
            if self.average is not None:
                self.average.wait()
                if self.average.is_void():
                    raise FloatingPointError("expected finite pseudo-gradients of every replica, got others")
        except Exception as error:
            self._manager.report_error(error)
        if not self._future.done():
            self._future.set_result(None)  # DiLoCo takes the averages out of its buffer
        return True

    def get_future(self):
        return self._future


def train(args):
    """One replica: a small network that learns another one's answers. Its last line says what came of it."""
    torch.manual_seed(0)
    teacher, model = (nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)) for _ in range(2))
    inner = torch.optim.AdamW(model.parameters(), lr=2e-3)
    store = dist.TCPStore(args.host, 0, is_master=True, wait_for_workers=False)
    manager = SparseManager(
        rt.TopKState(args.density, decay=0.95), fragments=args.fragments,
        load_state_dict=lambda saved: (model.load_state_dict(saved["model"]), inner.load_state_dict(saved["inner"])),
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
        min_replica_size=1, replica_id=f"replica_{args.replica}", lighthouse_addr=args.lighthouse, hostname=args.host,
        store_addr=args.host, store_port=store.port, rank=0, world_size=1, timeout=datetime.timedelta(seconds=20),
        quorum_timeout=datetime.timedelta(minutes=5),
    )  # fmt: skip
    if args.die_at is not None:
        average = manager.state.average

        def die_or_average(*arguments, **options):
            if manager.current_step() == args.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return average(*arguments, **options)

        manager.state.average = die_or_average
    members, uncounted, first_loss = set(), 0, None
    generator = torch.Generator().manual_seed(1000 + args.replica)
    fragments = [model] if args.fragments == 1 else [model[0], model[2]]
    outers = [torch.optim.SGD(fragment.parameters(), lr=1.0) for fragment in fragments]
    with DiLoCo(manager, fragments, inner, outers, sync_every=args.every, use_bucketization=True) as diloco:
        while manager.current_step() < args.rounds:
            before = manager.current_step()
            for _ in range(args.every // args.fragments):
                inputs = torch.randn(32, 64, generator=generator)
                loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
                inner.zero_grad()
                loss.backward()
                inner.step()
                time.sleep(args.pause)
                first_loss = first_loss or loss.item()
            members.add(manager.num_participants())
            uncounted += manager.current_step() <= before
        common = [weights for fragment in diloco._fragments for weights in fragment.original_parameters.values()]
    result = {
        "replica": args.replica, "rounds": manager.current_step(), "rounds that did not count": uncounted, "replicas": sorted(members),
        "first loss": round(first_loss, 5), "loss": round(loss.item(), 5), **manager.bytes(),
        "weights": hashlib.sha256(b"".join(weights.numpy().tobytes() for weights in common)).hexdigest()[:16],
    }  # fmt: skip
    manager.shutdown(wait=False)
    manager.state.close()
    print(json.dumps(result), flush=True)


def launch(args):
    """A lighthouse and two replicas on this machine; returns whether they end with the same weights."""
    os.environ.setdefault("RUST_LOG", "error")  # torchft says much
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=args.min_replicas, join_timeout_ms=5000, heartbeat_timeout_ms=2000)
    port = lighthouse.address().rpartition(":")[2]
    command = [
        sys.executable, __file__, "--lighthouse", f"http://localhost:{port}", "--rounds", str(args.rounds), "--every", str(args.every),
        "--density", str(args.density), "--pause", str(args.pause), "--fragments", str(args.fragments),
    ]  # fmt: skip
    start = lambda replica, *more: subprocess.Popen([*command, "--replica", str(replica), *more], stdout=subprocess.PIPE, text=True)  # noqa: E731
    replicas = [start(0), start(1, *(["--die-at", str(args.rounds // 3)] if args.kill else []))]
    if args.kill:
        replicas[1].wait()
        print(f"replica 1 ended with {replicas[1].returncode} and starts again", flush=True)
        replicas[1] = start(1)
    results = [json.loads(replica.communicate()[0].splitlines()[-1]) for replica in replicas]
    for result in results:
        print(json.dumps(result))
    lighthouse.shutdown()
    sent, dense = (sum(result[name] for result in results) for name in ("bytes_sent", "bytes_dense"))
    print(f"equal weights: {results[0]['weights'] == results[1]['weights']}; {sent / dense:.4f} of the bytes of a dense all-reduce")
    return results[0]["weights"] == results[1]["weights"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lighthouse", help="its address; without one, all run on this machine")
    parser.add_argument("--replica", type=int, default=0, help="number of this replica")
    parser.add_argument("--host", default="localhost", help="a name of this machine that the others know")
    parser.add_argument("--rounds", type=int, default=30, help="averages that count")
    parser.add_argument("--every", type=int, default=10, help="steps from one to the next")
    parser.add_argument("--fragments", type=int, default=1, choices=(1, 2), help="parts of the model that take turns")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after each step: a larger model's time")
    parser.add_argument("--min-replicas", type=int, default=2, choices=(1, 2), help="1: a replica does not wait for the other to come back")
    parser.add_argument("--kill", action="store_true", help="kill replica 1 after a third of the rounds")
    parser.add_argument("--die-at", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.lighthouse:
        train(arguments)
    else:
        sys.exit(not launch(arguments))
