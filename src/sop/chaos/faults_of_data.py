"""Faults 1 to 26: crashes, stores and queues, and episodes that are wrong."""

from sop.chaos.fault import Fault, tests

_CHAOS = "sop chaos --start debug"

FAULTS_OF_DATA = (
    Fault(
        number=1,
        title="a robot loses power in mid-episode",
        required="at its next start the step journal is played back; the episode is stored as aborted and never drawn",
        tests=tests(
            "test_actor_faults",
            "test_fault_1_an_episode_cut_by_a_power_failure_is_stored_as_aborted",
            "test_fault_1_an_actor_killed_in_mid_episode_leaves_its_steps",
            "test_a_journal_cut_or_damaged_anywhere_gives_the_steps_before_it",
        ),
        command=f"{_CHAOS} --nemeses kill,power-cut",
        lost="the last second of the running episode at most",
        recovery="next start of the robot",
    ),
    Fault(
        number=2,
        title="power is lost after the upload, before the announcement",
        required="the robot puts it again under the same key; the store has one copy",
        tests=tests("test_actor_parts", "test_an_upload_killed_anywhere_ends_with_one_copy_and_one_event"),
        recovery="next start of the robot",
    ),
    Fault(
        number=3,
        title="power is lost after the announcement, before the robot forgets its copy",
        required="announced again under the same id and dropped; one row in the index",
        tests=tests("test_actor_parts", "test_an_upload_killed_anywhere_ends_with_one_copy_and_one_event")
        + tests("test_buffer_ingest", "test_a_thousand_events_for_one_episode_index_it_once"),
        recovery="next start of the robot",
    ),
    Fault(
        number=4,
        title="the network is away for 24 hours",
        required="the spool keeps every episode and drains oldest first; the robot acts on with its last good policy",
        tests=tests("faults/test_links", "test_fault_4_a_day_without_a_network_loses_nothing_and_drains_oldest_first")
        + tests("test_broadcast_last_good", "test_what_was_accepted_is_there_at_the_next_start_without_a_network"),
        recovery="30 s after the network is back, then as fast as the link",
    ),
    Fault(
        number=5,
        title="the spool's disk is full",
        required="recording stops with an alarm and the robot idles; what waits is never overwritten",
        tests=tests(
            "test_actor_faults",
            "test_fault_5_when_the_spools_disk_is_full_the_robot_idles_and_goes_on_when_there_is_room",
        )
        + tests("test_actor_parts", "test_a_full_disk_refuses_and_keeps_what_waits")
        + tests("test_actor_loop", "test_an_actor_holds_while_nothing_can_be_recorded"),
        command=f"{_CHAOS} --nemeses disk-full",
        recovery="1 s after there is room",
    ),
    Fault(
        number=6,
        title="an upload is cut short or a bit of it flips",
        required="a cut put leaves nothing and is made again; other bytes than its key names are refused, counted",
        tests=tests(
            "test_transport_cloud_store",
            "test_a_put_cut_in_the_middle_leaves_nothing_and_is_made_once_by_trying_again",
        )
        + tests("test_hostile_episodes", "test_damaged_bytes_are_refused_counted_and_the_true_ones_get_in")
        + tests("test_buffer_ingest", "test_altered_bytes_never_reach_the_index"),
        command=f"{_CHAOS} --nemeses flip,truncate",
        lost="0; what rots in the store after it was acknowledged is named, and is as safe as that store",
        recovery="next attempt, under a second",
    ),
    Fault(
        number=7,
        title="the same event a thousand times",
        required="one row in the index",
        tests=tests("test_buffer_ingest", "test_a_thousand_events_for_one_episode_index_it_once")
        + tests("test_hostile_episodes", "test_a_thousand_events_index_an_episode_once"),
        command=f"{_CHAOS} --nemeses events-again",
        recovery="nothing to recover",
    ),
    Fault(
        number=8,
        title="events out of order, or lost",
        required="the store is listed against the index and everything that is missing gets in",
        tests=tests("test_buffer_ingest", "test_lost_and_reordered_events_are_healed_by_the_listing")
        + tests("test_hostile_episodes", "test_events_in_any_order_or_lost_are_healed_by_one_listing")
        + tests("test_broadcast_subscriber", "test_a_lost_event_is_healed_by_listing"),
        command=f"{_CHAOS} --nemeses events-lost,events-again",
        recovery="30 s: the next listing",
    ),
    Fault(
        number=9,
        title="the queue loses all its messages",
        required="the index is built from the store; no episode is missing",
        tests=tests("faults/test_links", "test_fault_9_a_bus_that_lost_everything_costs_no_episode")
        + tests(
            "test_transport_nats_faults",
            "test_a_server_that_lost_everything_is_filled_and_read_from_the_beginning",
        ),
        command=f"{_CHAOS} --nemeses bus-wiped",
        recovery="30 s: the next listing",
    ),
    Fault(
        number=10,
        title="the queue splits and serves two histories",
        required="whichever is read, the index becomes what the store has",
        tests=tests("faults/test_links", "test_fault_10_of_two_histories_the_index_is_that_of_the_store")
        + tests("test_transport_nats_faults", "test_a_server_that_was_set_back_is_read_from_the_beginning"),
        command=f"{_CHAOS} --nemeses bus-wiped",
        recovery="30 s: the next listing",
    ),
    Fault(
        number=11,
        title="the store answers 503, 409 or 412, or slowly",
        required="bounded attempts with jitter; taken by the same bytes is success, a conflict is tried again",
        tests=tests("faults/test_answers", "test_fault_11_what_the_store_answers_is_tried_again_or_settled")
        + tests(
            "test_transport_store",
            "test_a_put_is_tried_again_and_a_lost_answer_counts_as_success",
            "test_trying_again_is_bounded_and_its_pauses_grow_with_jitter",
            "test_a_key_taken_by_other_bytes_is_never_a_success",
        )
        + tests(
            "test_transport_cloud_store",
            "test_a_link_that_is_down_is_unavailable_until_it_heals",
            "test_a_link_that_stands_still_is_given_up_in_bounded_time",
        ),
        recovery="pauses of 0.1 to 30 s, then the next attempt",
    ),
    Fault(
        number=12,
        title="the store's listing is stale",
        required="numbers per robot show the gap; the next listing begins before it, nothing is skipped",
        tests=tests("test_hostile_episodes", "test_a_stale_listing_shows_a_gap_and_skips_nothing"),
        recovery="30 s after the listing is right",
    ),
    Fault(
        number=13,
        title="kill -9 of the learner at any moment",
        required="it goes on as if it had never stopped: weights, optimizer, sampler, random numbers",
        tests=tests(
            "test_learner",
            "test_a_resumed_learner_is_equal_to_one_that_never_stopped_to_the_bit",
            "test_without_its_rows_a_learner_rebuilds_the_index_and_loses_nothing",
        )
        + tests("test_learner_draws", "test_what_a_version_in_the_store_tells_is_not_told_twice_after_a_restart")
        + tests("test_run_debug", "test_struck_processes_lose_nothing"),
        command=f"{_CHAOS} --nemeses kill",
        lost="0; steps since the last checkpoint are taken again",
        recovery="start of a process, some 5 s",
    ),
    Fault(
        number=14,
        title="the learner's checkpoint is damaged",
        required="the one before is taken; the message names both",
        tests=tests("test_learner", "test_a_damaged_checkpoint_is_passed_over_for_the_one_before")
        + tests("test_learner_checkpoint", "test_weights_survive_a_segment_that_does_not"),
        recovery="start of a process, some 5 s",
    ),
    Fault(
        number=15,
        title="two learners on one run",
        required="the second is refused and told who holds the lease; what the old one publishes carries an old token",
        tests=tests(
            "test_learner_lease",
            "test_the_second_learner_is_told_who_holds_the_lease_and_what_to_do",
            "test_a_silent_holder_is_replaced_and_its_next_publish_is_refused",
            "test_of_many_newcomers_exactly_one_wins",
        )
        + tests("test_broadcast_publisher", "test_a_second_learner_on_the_same_run_is_noticed")
        + tests("test_broadcast_trust", "test_a_learner_that_lost_its_lease_is_not_followed"),
        command=f"{_CHAOS} --nemeses second-learner",
        recovery="30 s: the patience of the lease",
    ),
    Fault(
        number=16,
        title="clocks a day off, or jumping back",
        required="order is by numbers, never by time; expiry has a grace state with an alarm; nothing crashes",
        tests=tests("test_learner_lease", "test_a_clock_that_is_a_day_off_changes_nothing")
        + tests(
            "test_broadcast_trust",
            "test_a_clock_that_is_a_day_off_changes_nothing",
            "test_a_statement_from_far_in_the_future_waits_for_the_clocks",
        )
        + tests("test_transport_cloud_security", "test_a_clock_that_is_wrong_is_not_a_refusal_for_ever")
        + tests("faults/test_clocks", "test_fault_16_a_robots_clock_changes_neither_order_nor_contents_of_the_index"),
        recovery="nothing to recover; alarms end when the clock is right",
    ),
    Fault(
        number=17,
        title="a poison message: wrong schema, 10 GB, deep nesting, zip bomb, `../`",
        required="refused before anything is allocated, noted under quarantine/, and the consumer lives",
        tests=tests(
            "test_hostile_episodes",
            "test_an_object_is_read_only_as_far_as_its_key_allows",
            "test_images_that_claim_to_be_huge_allocate_nothing",
            "test_nesting_zip_bombs_and_paths_are_refused_and_the_consumer_lives",
        )
        + tests(
            "test_hostile_decoders",
            "test_damaged_records_are_refused_in_words",
            "test_extreme_records_are_refused_in_words",
            "test_no_decoder_takes_more_memory_than_it_may",
        ),
        recovery="at once: refused",
    ),
    Fault(
        number=18,
        title="NaN or Inf, wrong dtype, wrong number of joints, wrong unit",
        required="refused with field and step",
        tests=tests("test_hostile_episodes", "test_wrong_numbers_are_refused_with_field_and_step")
        + tests("test_core_episode", "test_a_wrong_value_is_refused_with_its_field_and_step"),
        recovery="at once: refused",
    ),
    Fault(
        number=19,
        title="time runs backwards, frames dropped, a camera frozen or black",
        required="refused, or stored with a note under screened/ and never drawn",
        tests=tests(
            "test_hostile_episodes",
            "test_time_that_runs_backwards_is_refused",
            "test_a_valid_but_unfit_episode_is_flagged_listed_and_kept",
            "test_what_stays_within_the_rules_is_not_flagged",
        ),
        recovery="at once: refused or flagged",
    ),
    Fault(
        number=20,
        title="images that cannot be decoded, or fewer than steps",
        required="refused; decoding runs in a process of its own with bounded memory",
        tests=tests("test_hostile_episodes", "test_images_that_cannot_be_decoded_or_are_too_few_are_refused")
        + tests("test_buffer_workers", "test_windows_that_kill_three_workers_are_named"),
        recovery="at once: refused",
    ),
    Fault(
        number=21,
        title="a pickle, a .pt or an object array is offered",
        required="refused by its form and never opened; nothing in the program can unpickle",
        tests=tests("test_hostile_files", "test_other_formats_are_refused_by_their_first_bytes_and_never_opened")
        + tests("test_architecture", "test_nothing_is_pickled_anywhere"),
        recovery="at once: refused",
    ),
    Fault(
        number=22,
        title="safetensors with a million tensors, overlapping offsets, wrong shapes",
        required="refused in little time and memory",
        tests=tests("test_broadcast_weights", "test_hostile_sizes_are_refused_in_little_memory")
        + tests(
            "test_hostile_files",
            "test_weights_whose_header_lies_are_refused",
            "test_a_million_tensors_cost_less_than_a_second_and_200_mb",
        ),
        recovery="at once: refused",
    ),
    Fault(
        number=23,
        title="an Arrow file with an extension type",
        required="refused; no type of it is looked up",
        tests=tests("test_hostile_files", "test_an_arrow_file_with_an_extension_type_is_refused"),
        recovery="at once: refused",
    ),
    Fault(
        number=24,
        title="an unknown task or prompt",
        required="stored, not drawn, told to the operator",
        tests=tests("test_hostile_episodes", "test_an_unknown_task_or_prompt_is_stored_not_sampled_and_told"),
        recovery="at once: flagged",
    ),
    Fault(
        number=25,
        title="an outcome is missing, or contradicts a safety stop",
        required="missing: refused; contradictory: kept out of learning and listed for review",
        tests=tests(
            "test_hostile_episodes",
            "test_a_missing_outcome_is_refused",
            "test_a_valid_but_unfit_episode_is_flagged_listed_and_kept",
        ),
        recovery="at once: refused or flagged",
    ),
    Fault(
        number=26,
        title="a task of which all episodes failed, or all succeeded, under RECAP",
        required="the run refuses to start its value function and says which task has what",
        tests=tests(
            "test_values_calibration",
            "test_every_task_needs_a_success_and_a_failure_and_the_message_says_what_it_has",
            "test_a_run_without_the_outcomes_is_refused_and_one_with_them_is_not",
        ),
        recovery="when there are episodes of both kinds",
    ),
)
"""Faults 1 to 26."""
