"""Faults 27 to 50: weights, identities, people and robots, and the whole system."""

from sop.chaos.fault import Fault, tests

FAULTS_OF_POLICIES = (
    Fault(
        number=27,
        title="a loss that is NaN, gradients that explode",
        required="the step changes nothing, is logged; three in a row end the learner, nothing is published",
        tests=tests(
            "test_learner", "test_a_loss_that_is_not_finite_changes_nothing_and_three_in_a_row_stop_the_learner"
        )
        + tests(
            "test_learner_publish_gate",
            "test_a_single_weight_that_is_not_finite_is_refused_and_named",
            "test_refusals_in_a_row_end_the_run_and_a_good_version_forgives",
        ),
        recovery="restart from the last checkpoint, some 5 s",
    ),
    Fault(
        number=28,
        title="a publish is interrupted at any byte",
        required="robots never see it: a policy without its manifest does not exist",
        tests=tests("test_broadcast_signing", "test_a_publish_that_is_interrupted_anywhere_is_never_seen")
        + tests("test_broadcast_trust", "test_an_object_that_ends_at_any_byte_is_never_run")
        + tests(
            "test_broadcast_subscriber",
            "test_a_publisher_that_breaks_anywhere_never_reaches_a_robot_with_half_a_policy",
        ),
        command="sop chaos --start debug --nemeses kill,power-cut",
        recovery="the next publish",
    ),
    Fault(
        number=29,
        title="weights unsigned, by a wrong key, expired, or below the threshold",
        required="refused in words; the old policy stays",
        tests=tests(
            "test_broadcast_trust",
            "test_a_policy_that_nobody_vouches_for_is_refused_and_the_old_one_stays",
            "test_below_the_threshold_is_refused",
            "test_an_expired_statement_is_refused_unless_the_policy_was_accepted_before",
        )
        + tests("test_broadcast_channels", "test_prod_asks_for_both_signatures"),
        recovery="at once: refused",
    ),
    Fault(
        number=30,
        title="an old signed policy is replayed",
        required="refused, unless a newer signed order names it (rollback)",
        tests=tests(
            "test_broadcast_channels", "test_going_back_takes_a_newer_order", "test_a_ban_is_no_door_for_an_old_policy"
        )
        + tests("test_broadcast_trust", "test_an_old_signed_policy_is_not_run_again"),
        recovery="at once: refused",
    ),
    Fault(
        number=31,
        title="freeze: nothing newer ever comes",
        required="the robot acts on and says that nothing newer reaches it",
        tests=tests("test_broadcast_trust", "test_when_nothing_fresh_comes_the_robot_says_since_when")
        + tests("test_broadcast_channels", "test_an_expired_state_still_holds_and_the_robot_says_so"),
        recovery="alarm when the state expires",
    ),
    Fault(
        number=32,
        title="tensors of two versions mixed",
        required="the hashes of the signed manifest refuse it",
        tests=tests(
            "test_broadcast_packed", "test_a_delta_over_other_bytes_than_its_base_is_noticed_by_the_tensors_hashes"
        )
        + tests("test_broadcast_trust", "test_tensors_of_two_versions_are_refused"),
        recovery="at once: refused, another form is taken",
    ),
    Fault(
        number=33,
        title="a policy for another robot, action space, statistics or cameras",
        required="refused by what its manifest says it was trained for",
        tests=tests("test_broadcast_trust", "test_a_signed_policy_for_another_robot_is_refused")
        + tests("test_broadcast_refusals", "test_a_bad_policy_is_refused_once_and_the_old_one_stays"),
        recovery="at once: refused",
    ),
    Fault(
        number=34,
        title="a delta without its base",
        required="the form that stands alone is fetched instead",
        tests=tests(
            "test_broadcast_signing",
            "test_a_delta_without_its_base_is_not_used_and_the_whole_is_fetched",
        )
        + tests(
            "test_broadcast_packed",
            "test_a_broken_delta_is_gone_around_by_the_keyframe",
            "test_without_the_base_a_robot_waits_for_it_and_refuses_another_one",
        ),
        recovery="one fetch",
    ),
    Fault(
        number=35,
        title="a revoked robot uploads or listens",
        required="store and bus refuse it at once, the others go on",
        tests=tests(
            "test_fleet_store_access",
            "test_a_revoked_robot_is_refused_while_the_others_go_on_and_comes_back_with_new_keys_alone",
        )
        + tests(
            "test_fleet_bus_access",
            "test_each_role_says_and_hears_what_it_may",
            "test_a_revoked_robot_is_dropped_at_once_while_the_others_go_on",
        ),
        recovery="seconds, at most 60",
    ),
    Fault(
        number=36,
        title="robot A writes under the folder of robot B, or reads it",
        required="forbidden by the store and by the bus",
        tests=tests("test_fleet_store_access", "test_a_robot_writes_its_own_episodes_reads_policies_and_nothing_else")
        + tests("test_fleet_bus_access", "test_a_robot_cannot_speak_as_another_or_hear_what_is_for_others"),
        recovery="at once: refused",
    ),
    Fault(
        number=37,
        title="no TLS, self-signed, downgraded, expired certificate",
        required="no connection, from either side",
        tests=tests(
            "test_fleet_bus_access",
            "test_no_certificate_a_foreign_one_an_expired_one_old_tls_and_no_tls_are_refused",
            "test_a_member_refuses_a_server_of_another_authority_and_one_without_tls",
        )
        + tests("test_transport_cloud_security", "test_the_identitys_authority_is_believed_and_no_other"),
        recovery="at once: refused",
    ),
    Fault(
        number=38,
        title="commands replayed, out of order, or 10,000 a second",
        required="dropped by number and age, limited in rate; the robot holds",
        tests=tests("test_operators_link", "test_replays_overtaken_old_and_foreign_frames_and_floods_do_not_count")
        + tests(
            "test_actor_gate_process",
            "test_repeated_overtaken_old_and_flooding_commands_are_dropped_and_the_robot_holds",
        ),
        recovery="the next fresh command",
    ),
    Fault(
        number=39,
        title="a port scan",
        required="robots and learner listen nowhere, test servers on loopback alone; garbage gets no traceback",
        tests=tests(
            "faults/test_ports",
            "test_fault_39_no_process_of_a_run_listens_anywhere",
            "test_fault_39_servers_answer_garbage_with_nothing_useful",
        ),
        recovery="nothing to recover",
    ),
    Fault(
        number=40,
        title="secrets in logs, episodes, checkpoints",
        required="a scanner finds none in anything that a run with identities wrote, nor on a command line",
        tests=tests("faults/test_secrets", "test_fault_40_no_secret_is_in_anything_that_a_run_writes")
        + tests("test_fleet_store_access", "test_no_secret_is_in_a_log_or_on_a_command_line")
        + tests("test_fleet_bus_access", "test_no_secret_is_in_the_log_or_on_the_command_line"),
        recovery="nothing to recover",
    ),
    Fault(
        number=41,
        title="one robot sends a hundred times as much",
        required="its share of any batch is capped, and what is over its quota waits in the store",
        tests=tests(
            "faults/test_one_robot",
            "test_fault_41_a_robot_that_sends_a_hundred_times_as_much_gets_its_share_of_a_batch_and_no_more",
            "test_fault_41_a_flood_waits_in_the_store_and_the_others_get_in",
        ),
        recovery="it waits; the others do not",
    ),
    Fault(
        number=42,
        title="one robot of ten flips labels or sends noise",
        required="its share bounds the harm, and `sop inspect` names it",
        tests=tests(
            "faults/test_one_robot",
            "test_fault_42_a_robot_that_flips_its_labels_is_named",
            "test_fault_42_a_robot_that_sends_noise_is_named_by_what_its_windows_cost_and_its_part_is_bounded",
        ),
        recovery="people revoke it; what is stored stays",
    ),
    Fault(
        number=43,
        title="the operator's link is lost during a takeover",
        required="hold after 200 ms, safe pose after 5 s, never back to the policy by itself; the episode is marked",
        tests=tests(
            "test_operators_link",
            "test_a_link_lost_during_a_takeover_holds_then_goes_to_the_safe_pose_and_never_back_to_the_policy",
            "test_an_episode_with_a_lost_link_is_marked_and_the_chunk_was_dropped",
        ),
        recovery="the next frame of the same person",
    ),
    Fault(
        number=44,
        title="two operators take the same robot",
        required="one drives, the other sees who",
        tests=tests("test_operators_link", "test_one_operator_drives_and_the_other_sees_who"),
        recovery="when the first lets go",
    ),
    Fault(
        number=45,
        title="a takeover during a swap or a chunk",
        required="a swap waits for the end of the episode, the chunk is dropped, no jump beyond the limits",
        tests=tests("test_actor_loop", "test_when_control_changes_hands_the_rest_of_the_chunk_is_dropped")
        + tests("test_actor_loop", "test_a_policy_is_swapped_between_episodes_only")
        + tests("test_operators_link", "test_the_first_command_of_a_person_is_near_the_measured_pose"),
        recovery="nothing to recover",
    ),
    Fault(
        number=46,
        title="the robot's accelerator has no memory for a new policy",
        required="the old one is kept, with a message",
        tests=tests(
            "test_actor_faults",
            "test_fault_46_a_policy_that_does_not_fit_the_memory_is_refused_and_the_old_one_acts_on",
        ),
        recovery="the next version",
    ),
    Fault(
        number=47,
        title="a hundred robots fetch at one publish",
        required="each gets all of it, and the learner's hand-over returns at once",
        tests=tests("faults/test_many", "test_fault_47_a_hundred_robots_fetch_and_the_learner_does_not_wait"),
        recovery="as long as the link needs: docs/performance.md",
    ),
    Fault(
        number=48,
        title="hours of random faults",
        required="the independent checker finds nothing lost, doubled, altered or mixed; memory and lag stay flat",
        tests=tests("test_run_debug", "test_struck_processes_lose_nothing"),
        command="sop chaos --start debug --kills 20; for hours: sop soak",
        recovery="each strike's own",
    ),
    Fault(
        number=49,
        title="restore from a backup at an empty place",
        required="`sop store copy` brings every episode and the promoted policy; a new learner goes on",
        tests=tests(
            "faults/test_restore",
            "test_fault_49_a_new_learner_goes_on_from_a_copy_of_the_store",
            "test_fault_49_a_copy_that_was_interrupted_is_finished_by_the_next",
        ),
        command="sop store copy SRC DST --verify",
        recovery="as long as the copy takes",
    ),
    Fault(
        number=50,
        title="one version up or down during a run",
        required="episodes, events and manifests with fields of a neighbouring version are read, or refused in words",
        tests=tests(
            "test_core_upgrade",
            "test_fault_50_an_episode_of_an_older_program_is_read",
            "test_fault_50_an_older_program_reads_the_episode_of_a_newer_one",
            "test_fault_50_another_schema_is_refused_with_both_versions",
        )
        + tests("faults/test_upgrades", "test_fault_50_events_and_manifests_with_unknown_fields_are_read"),
        recovery="nothing to recover",
    ),
)
"""Faults 27 to 50."""
