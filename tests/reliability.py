"""What runs promise, the tests that hold them to it, and the figures those measured last: docs/reliability.md.

  GLOW_FIGURES=figures.jsonl make test
  python -m tests.reliability figures.jsonl

The second command takes the figures over into docs/reliability.jsonl, of each the worst in its file, and writes the
page; without a file it writes the page alone. The two of benches at their full size are written there by hand.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES = DOCS / "reliability.md", DOCS / "reliability.jsonl"

Figure = dict[str, Any]


@dataclass(frozen=True)
class Promise:
    """A promise, and the tests of it as pytest names them, below tests/."""

    name: str
    what: str
    figure: str
    tests: tuple[str, ...]


PROMISES = (
    Promise("R1", "a worker is killed (`kill -9`)",
            "back from the last checkpoint; at most one interval is lost; the tensors of an unbroken run",
            ("jobs/test_train.py::test_two_ray_workers_and_a_kill_learn_the_same",
             "jobs/test_failures.py::test_failures_count_between_checkpoints",
             "jobs/test_failures.py::test_ray_restarts_workers_as_often_as_they_get_further",
             "pipeline/test_train.py::test_killed_and_run_again_ends_in_the_same_bits",
             "jobs/test_soak.py::test_faults_at_random_change_nothing")),
    Promise("R2", "the driver or the head is killed, and the same command given again",
            "as R1; no second MLflow run, no second version",
            ("jobs/test_nodes.py::test_a_node_is_lost_then_the_head_and_a_node_gives_notice",
             "jobs/test_nodes.py::test_a_job_whose_head_is_lost_is_submitted_again",
             "jobs/test_failures.py::test_a_head_that_goes_bit_by_bit_is_a_line",
             "jobs/test_failures.py::test_a_mailbox_that_is_held_is_waited_for_and_it_is_said",
             "jobs/test_failures.py::test_a_driver_outlives_the_store_of_objects_on_its_node",
             "jobs/test_train.py::test_a_killed_driver_leaves_no_process_and_the_next_start_no_folder",
             "jobs/test_demo.py::test_killed_at_every_stage_it_ends_in_the_same_artifact",
             "pipeline/test_tracking.py::test_a_killed_and_resumed_run_has_every_row_once_and_in_order")),
    Promise("R3", "a node is lost, or joins",
            "elastic: goes on with what there is, and grows; fixed: waits, and says so; never silent over 60 s",
            ("jobs/test_nodes.py::test_a_node_is_lost_then_the_head_and_a_node_gives_notice",
             "jobs/test_nodes.py::test_an_elastic_run_grows_by_a_node_and_loses_it",
             "jobs/test_nodes.py::test_a_job_whose_head_is_lost_is_submitted_again")),
    Promise("R4", "SIGTERM, `cluster stop`, or Ray's notice that a node goes in 15 s",
            "a checkpoint of this very step within the 15 s; 0 steps lost",
            ("jobs/test_nodes.py::test_a_node_is_lost_then_the_head_and_a_node_gives_notice",
             "jobs/test_train.py::test_a_signal_ends_a_ray_run_and_the_same_command_goes_on",
             "jobs/test_road.py::test_the_whole_system_as_the_readme_says")),
    Promise("R5", "stopped at step k and gone on",
            "parameters, averages, moments, random numbers and order bit-equal (CPU, float32)",
            ("jobs/test_train.py::test_a_signal_ends_a_ray_run_and_the_same_command_goes_on",
             "pipeline/test_train.py::test_killed_and_run_again_ends_in_the_same_bits",
             "pipeline/test_optim.py::test_resuming_equals_not_stopping")),
    Promise("R6", "1, 2, 3, 4, then 1 worker",
            "the same samples in the same order; `tree`: bit-equal tensors; `overlap`: equal within rounding",
            ("pipeline/test_train.py::test_any_number_of_workers_one_after_the_other_ends_in_the_same_bits",
             "pipeline/test_train.py::test_overlap_learns_the_same_up_to_rounding_on_any_number_of_workers",
             "pipeline/test_order.py::test_any_world_reads_the_same_batches",
             "pipeline/test_world.py::test_the_tree_sum_has_the_same_bits_for_any_world")),
    Promise("R7", "over failures",
            "in the history that survives each sample comes exactly once an epoch",
            ("pipeline/test_elastic.py::test_every_sample_once_over_kills_and_other_numbers_of_ranks",
             "jobs/test_train.py::test_the_loop_learns_each_sample_once_over_kills_and_other_numbers_of_ranks",
             "pipeline/test_order.py::test_resuming_anywhere_equals_not_stopping")),
    Promise("R8", "a crash before any single write, rename, link or removal of a save",
            "the last committed checkpoint loads, whichever boundary it was (all enumerated)",
            ("pipeline/test_checkpoint.py::test_a_crash_anywhere_loses_at_most_the_step_being_saved",
             "pipeline/test_checkpoint_s3.py::test_a_death_around_any_request_loses_at_most_the_step_being_saved")),
    Promise("R9", "checkpoint files flipped, cut, swapped, removed",
            "always detected; one step back, loudly; never a silent fresh start",
            ("pipeline/test_checkpoint.py::test_damage_costs_one_step_loudly",
             "pipeline/test_checkpoint.py::test_every_flipped_byte_of_a_commit_is_seen",
             "pipeline/test_checkpoint.py::test_swapped_files_are_seen",
             "pipeline/test_checkpoint.py::test_no_silent_fresh_start",
             "pipeline/test_checkpoint_s3.py::test_damage_of_any_object_costs_one_step_loudly",
             "pipeline/test_checkpoint_s3.py::test_swapped_objects_are_seen")),
    Promise("R10", "S3 refuses, resets, stalls, cuts short",
            "20 % errors, stalls of 2 s: every sample comes, once; median step +10 % at most; away for good: exit 7",
            ("pipeline/test_faults.py::test_an_epoch_over_a_bad_network",
             "pipeline/test_faults.py::test_every_sample_comes_once_through_refusals_resets_stalls_and_cuts",
             "pipeline/test_faults.py::test_a_service_that_is_away_for_good_is_one_line_and_exit_7",
             "jobs/test_bench_data.py::test_faults_are_repeated")),
    Promise("R11", "a shard cut, corrupted, replaced, swapped",
            "always detected, before a sample of it reaches the model",
            ("pipeline/test_stream.py::test_a_changed_shard_is_named_before_a_sample_of_it_is_used",
             "pipeline/test_damage.py::test_no_damage_of_a_shard_is_silent",
             "pipeline/test_damage.py::test_shards_that_changed_places_are_found")),
    Promise("R12", "MLflow down at the start, in the middle, for good",
            "exit 7 within 10 s, or `--offline`; then no effect on step time; what was missed arrives in order, once",
            ("pipeline/test_outages.py::test_an_mlflow_that_is_dead_at_the_start_is_exit_7_unless_offline",
             "pipeline/test_outages.py::test_an_mlflow_that_comes_and_goes_is_never_waited_for_and_misses_nothing",
             "pipeline/test_tracking.py::test_closing_is_bounded_and_says_what_was_not_sent",
             "pipeline/test_tracking_stack.py::test_all_points_arrive_once_and_in_order_at_an_mlflow_that_refuses_us_and_hangs",
             "jobs/test_models_stack.py::test_what_an_offline_run_recorded_is_delivered_by_the_next_command",
             "jobs/test_bench_tracking.py::test_no_state_makes_a_step_wait")),
    Promise("R13", "disk full: cache, checkpoint, spool",
            "the cache makes room; a checkpoint fails cleanly and the last good one stays; a full spool is said once",
            ("pipeline/test_full_disk.py::test_a_full_disk_evicts_and_goes_on_or_ends_in_a_line",
             "pipeline/test_stream.py::test_the_cache_keeps_its_bound_and_each_shard_comes_once_an_epoch",
             "pipeline/test_checkpoint.py::test_a_full_disk_fails_cleanly_on_every_rank",
             "pipeline/test_tracking.py::test_a_full_spool_is_said_once_and_training_goes_on",
             "pipeline/test_full_run.py::test_a_full_disk_ends_a_run_in_a_line_and_room_lets_it_go_on",
             "pipeline/test_full_run.py::test_a_spool_on_a_full_disk_drops_rows_and_keeps_whole_lines")),
    Promise("R14", "NaN, infinity or a spike on one rank",
            "no update on any rank; bounded skips, one rollback, then exit 8 naming the samples",
            ("pipeline/test_guard.py::test_one_bad_sample_on_one_rank_moves_no_rank_and_is_named",
             "pipeline/test_train.py::test_a_run_that_diverges_goes_back_once_and_names_what_it_met",
             "pipeline/test_train.py::test_no_checkpoint_holds_weights_whose_gradient_is_refused",
             "pipeline/test_train.py::test_a_run_does_not_end_with_weights_that_are_no_numbers",
             "pipeline/test_optim.py::test_the_guard_skips_counts_and_forgives",
             "pipeline/test_optim.py::test_the_guard_stops_a_run_that_has_diverged")),
    Promise("R15", "clocks that are wrong",
            "nothing is ordered by wall time",
            ("pipeline/test_checkpoint.py::test_order_is_by_number_never_by_clock",
             "pipeline/test_clocks.py::test_wall_clocks_are_read_where_a_time_is_told_and_nowhere_else",
             "pipeline/test_lease.py::test_a_silent_holder_elsewhere_is_given_its_time")),
    Promise("R19", "other settings under the name of a run",
            "refused with what differs and the two commands that would be right",
            ("pipeline/test_train.py::test_other_settings_under_the_same_name_are_refused_by_name",)),
    Promise("R20", "two jobs, one run",
            "the second is refused; a silent holder is followed after 60 s (configurable); its late commit is void",
            ("pipeline/test_train.py::test_two_jobs_do_not_train_one_run",
             "pipeline/test_lease.py::test_of_many_at_once_one_holds_it",
             "pipeline/test_lease.py::test_a_silent_holder_elsewhere_is_given_its_time",
             "pipeline/test_lease.py::test_a_former_holder_cannot_commit",
             "pipeline/test_lease.py::test_a_commit_that_a_former_holder_had_under_way_is_void")),
    Promise("R21", "gradients by inversion",
            "float64 <= 1e-8; float32 <= 1e-4 of the total norm, on trained stacks, with anchors",
            ("glow/test_gradients.py::test_anchored_gradients_are_plain_autograds",
             "glow/test_gradients.py::test_a_whole_models_anchored_gradients_are_plain_autograds",
             "glow/test_gradients.py::test_float32_gradients_of_a_trained_stack")),
    Promise("R22", "memory",
            "loader flat over 3 epochs and more; bytes saved for backward independent of the number of steps K",
            ("pipeline/test_stream.py::test_what_is_open_stays_bounded_over_epochs",
             "glow/test_memory.py::test_pure_inversion_saves_the_same_for_any_number_of_steps",
             "glow/test_memory.py::test_a_model_saves_the_same_for_any_number_of_steps",
             "jobs/test_soak.py::test_faults_at_random_change_nothing",
             "jobs/test_bench_data.py::test_three_ways_an_encoding_and_memory_that_stays")),
    Promise("R23", "any exit: done, refused, stopped, killed",
            "no process, shared memory or temporary file left",
            ("jobs/test_train.py::test_two_ray_workers_and_a_kill_learn_the_same",
             "jobs/test_train.py::test_a_refusal_on_a_worker_is_final_and_keeps_its_exit_code",
             "jobs/test_train.py::test_a_signal_ends_a_ray_run_and_the_same_command_goes_on",
             "jobs/test_train.py::test_a_killed_driver_leaves_no_process_and_the_next_start_no_folder",
             "pipeline/test_stream.py::test_closing_leaves_no_thread_descriptor_or_temporary_file",
             "pipeline/test_scratch.py::test_folders_go_with_their_owner_or_after_it_and_never_before",
             "jobs/test_soak.py::test_faults_at_random_change_nothing")),
)  # fmt: skip


def measured(promise: str, what: str, value: float, unit: str) -> None:
    """Keep what a test found, where GLOW_FIGURES names a file for it."""
    path = os.environ.get("GLOW_FIGURES")
    if path:
        day = datetime.now(tz=UTC).date().isoformat()
        row = {"promise": promise, "what": what, "value": float(f"{value:.3g}"), "unit": unit, "date": day}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def rows(path: Path) -> list[Figure]:
    """The figures of a file, of several of a kind the largest, which is the worst: seconds, errors, ratios."""
    found = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return sorted(found, key=lambda figure: figure["value"])


def newest(figures: Iterable[Figure]) -> list[Figure]:
    """The last of every kind, in the order of promises."""
    order = [promise.name for promise in PROMISES]
    last = {(figure["promise"], figure["what"]): figure for figure in figures}
    return sorted(last.values(), key=lambda figure: (order.index(figure["promise"]), figure["what"]))


def page(figures: list[Figure]) -> str:
    """The text of docs/reliability.md."""
    head, tail = PAGE.read_text(encoding="utf-8").split("<!-- made by python -m tests.reliability -->\n")[::2]
    made = "<!-- made by python -m tests.reliability -->\n"
    return head + made + table(figures) + made + tail


def table(figures: list[Figure]) -> str:
    """A row a promise: what happens, what is promised, the tests, what they measured last."""
    lines = ["| | when | promised | tests | last measured |", "|---|---|---|---|---|"]
    for promise in PROMISES:
        tests = "<br>".join(f"`{name.partition('::')[2]}` ({name.partition('::')[0]})" for name in promise.tests)
        found = "<br>".join(_told(figure) for figure in figures if figure["promise"] == promise.name)
        lines.append(f"| {promise.name} | {promise.what} | {promise.figure} | {tests} | {found} |")
    return "\n".join([*lines, ""])


def _told(figure: Figure) -> str:
    return f"{figure['what']}: {figure['value']:g} {figure['unit']} ({figure['date']})"


def main() -> None:
    """Take over figures, write the page."""
    found = newest([*rows(FIGURES), *(row for name in sys.argv[1:] for row in rows(Path(name)))])
    FIGURES.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
