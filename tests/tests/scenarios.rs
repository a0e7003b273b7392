//! The demo's scenarios and more, each in a testbed of its own, each ending with a look for leftovers.

mod common;

use common::run;
use ztunnel_tests::scenarios::{
    basics, closed, cost, enrolment, outage, policy, probes, repair, restart, same_node, scale, sockets,
    tunnel,
};

macro_rules! scenarios {
    ($($name:ident => $scenario:expr;)*) => {
        $(#[test] fn $name() { run($scenario); })*
    };
}

scenarios! {
    client_and_server_talk_on_both_families => basics::BOTH_FAMILIES;
    a_service_is_reached_by_its_cluster_ip => basics::SERVICE;
    a_pod_of_the_same_node_is_reached => same_node::SAME_NODE;
    between_pods_of_a_node_policies_hold_and_restarts_keep => same_node::POLICY_AND_CHANGE;
    between_pods_of_a_node_all_can_be_encrypted => same_node::ENCRYPTED;
    only_tls_1_3_goes_over_the_link => tunnel::ONLY_TLS;
    both_sides_verify_an_identity => tunnel::IDENTITIES;
    a_denied_service_account_is_refused_and_logged => policy::DENIED;
    an_open_connection_is_cut_by_a_new_policy => policy::OPEN_CONNECTION_CUT;
    strict_refuses_plaintext_and_permissive_takes_it => policy::STRICT;
    outside_the_mesh_nothing_changes => policy::OUTSIDE_UNTOUCHED;
    only_the_node_may_probe => probes::ONLY_THE_NODE;
    a_killed_client_side_is_closed_and_comes_back => outage::KILLED_SOURCE;
    a_killed_server_side_is_closed_and_comes_back => outage::KILLED_DESTINATION;
    a_kill_at_any_moment_never_opens_a_way => outage::KILLED_AT_ANY_MOMENT;
    a_daemon_killed_after_its_take_over_gives_the_pods_back => outage::KILLED_AFTER_TAKE_OVER;
    a_kill_under_strict_never_lets_plaintext_in => outage::KILLED_UNDER_POLICY;
    twenty_restarts_under_load_fail_no_attempt => restart::TWENTY_RESTARTS;
    an_open_connection_survives_a_restart => restart::OPEN_CONNECTIONS_DRAIN;
    enrolling_and_withdrawing_keep_open_connections => enrolment::OPEN_CONNECTIONS;
    pods_that_leave_the_mesh_under_load_lose_no_attempt => enrolment::UNDER_LOAD;
    a_withdrawn_pod_is_clean => enrolment::WITHDRAWN_CLEAN;
    a_withdrawn_pod_keeps_its_tunnel_over_a_restart => restart::WITHDRAWN_THEN_RESTARTED;
    a_namespace_made_again_is_captured_again => enrolment::NAMESPACE_REMADE;
    a_deleted_pod_does_no_harm => enrolment::POD_DELETED;
    a_pod_that_cannot_be_captured_is_closed => closed::TOO_MANY_DEVICES;
    a_damaged_pod_is_repaired => repair::DAMAGED_POD;
    deleted_pins_are_restored => repair::PINS_DELETED;
    a_new_connection_costs_a_bounded_number_of_system_calls => cost::NEW_CONNECTIONS;
    a_request_costs_six_system_calls => cost::REQUESTS;
    a_megabyte_costs_few_system_calls => cost::BULK;
    a_closed_port_is_refused_at_once => sockets::CLOSED_PORT;
    a_port_that_a_firewall_rejects_is_refused => sockets::REJECTED_PORT;
    a_client_uses_all_of_its_few_source_ports => sockets::FEW_SOURCE_PORTS;
    a_client_holds_thousands_of_connections => sockets::MANY_CONNECTIONS;
    a_pod_is_a_client_of_itself => sockets::ITSELF;
    a_pod_is_one_of_several_endpoints_of_what_it_dials => sockets::ONE_OF_SEVERAL;
    two_hundred_pods_on_one_node => scale::TWO_HUNDRED_PODS;
}
