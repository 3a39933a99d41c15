"""A run whose collectives are counted for one step, next to what preflight says of it."""

from bitfleet.launch.bench.comm import CollectiveCounter
from bitfleet.launch.job import command_line, job, run
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.preflight.preflight import Preflight
from bitfleet.trainer.run.stop import StopWatcher
from bitfleet.trainer.trainer import Trainer


def main() -> None:
    config = parse_train(command_line(), "preflight_job.py")
    with job(config.device, config) as (ranks, device):
        trainer = Trainer(config, ranks, device)
        preflight = Preflight(trainer)
        trainer.start()
        with StopWatcher(trainer.folder.path, ranks, launched=True) as stop:
            trainer.train_step()
            trainer.train_step()
            stop.agree()
            with CollectiveCounter(ranks.world_size) as counter:
                trainer.train_step()
                stop.agree()
        if ranks.is_main:
            print(f"predicted {preflight.sent_bytes:.1f} counted {counter.sent_bytes:.1f}", flush=True)
        trainer.stop()


if __name__ == "__main__":
    run(main)
