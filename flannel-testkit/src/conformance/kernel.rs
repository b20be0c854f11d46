//! What every [`Kernel`](flannel_core::Kernel) promises, and the rules of Linux on which the planner relies.
//!
//! The suite runs on the fake kernel and on the real one: the first shows that a test on the fake
//! says something about Linux, the second that the codec does what the trait says. Each promise is
//! a function on a fresh [`KernelFixture`]; [`PROMISES`] lists them, [`all`] runs them and
//! [`kernel_conformance!`](crate::kernel_conformance!) makes a test of each.

mod claims;
mod contract;
mod devices;
mod disturbed;
mod fixture;
mod linux;
mod packets;
mod refusals;
mod told;
mod tunnels;

use std::pin::Pin;

pub use claims::*;
pub use contract::*;
pub use devices::*;
pub use disturbed::*;
pub use fixture::{KernelFixture, UNDERLAY_V4, UNDERLAY_V6, underlay};
pub use linux::*;
pub use packets::*;
pub use refusals::*;
pub use told::*;
pub use tunnels::*;

/// The outcome of a promise; the text says what was found instead.
pub type Outcome = Result<(), String>;

/// A promise: a function on a fresh fixture.
pub type Promise =
    for<'a> fn(&'a KernelFixture) -> Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;

/// Makes a test of every promise of [`conformance::kernel`](crate::conformance::kernel).
///
/// Takes a function `fn(Promise)` that makes a fixture, runs the promise on it and panics if it is
/// broken.
#[macro_export]
macro_rules! kernel_conformance {
    (@list $($form:tt)*) => {
        $crate::kernel_conformance! { @as $($form)*;
            apply_then_observe_returns_what_was_asked
            create_never_overwrites
            create_is_idempotent
            delete_is_idempotent
            delete_spares_what_is_not_meant
            change_keeps_dependants
            change_moves_a_route_between_gateway_and_nexthop
            what_cannot_change_in_place_is_unsupported
            one_bad_op_does_not_stop_the_others
            a_missing_device_is_named
            observe_shows_foreign_objects
            observe_is_complete
            observing_a_missing_device_is_no_error
            probing_changes_nothing
            foreign_changes_are_hinted
            link_down_drops_routes_and_neighbours
            deleting_a_link_drops_what_is_on_it
            deleting_an_underlay_deletes_what_is_bound_to_it
            an_underlay_down_spares_the_overlay
            deleting_a_nexthop_drops_its_routes
            a_new_mac_drops_neighbours
            the_last_ipv4_address_takes_routes_along
            two_vxlan_devices_cannot_share_vni_and_port
            an_ipv6_address_has_one_length
            routes_need_a_device_that_is_up
            a_gateway_must_be_reachable
            an_on_link_gateway_must_not_be_routed_elsewhere
            a_wider_route_elsewhere_counts_for_an_on_link_gateway
            settings_are_changed_never_made
            a_device_is_made_as_asked_or_not_at_all
            an_address_must_be_fit
            a_remote_is_of_the_devices_family
            a_neighbour_is_taken_as_it_is
            a_forwarding_entry_is_of_one_device
            a_route_leads_somewhere
            delete_spares_what_differs
            change_makes_what_is_gone
            an_underlay_changes_in_place
            an_underlay_is_not_taken_away
            devices_of_one_port_agree_on_group_policy
            a_veth_pair_goes_as_one
            a_vxlan_device_has_no_address_of_its_own
            an_address_brings_its_network
            the_last_ipv6_address_goes_alone
            a_change_leaves_what_it_does_not_name
            what_needs_a_failed_op_is_skipped
            a_device_that_goes_in_a_batch_is_missing_after
            a_reading_among_changes_is_whole_or_an_error
            settings_alone_are_those_of_the_whole
            changes_of_a_device_are_hinted
            own_changes_are_told
            the_last_word_about_a_key_is_right
            keys_alone_are_those_of_the_whole
            links_alone_are_those_of_the_whole
            a_lookup_answers_the_route
            a_lookup_tells_a_black_hole
            forwarding_that_is_off_is_told
            a_tun_device_is_made_as_asked
            a_tun_device_never_takes_a_name_that_is_taken
            a_tun_device_changes_in_place
            a_tun_device_has_no_address_of_its_own
            a_packet_path_needs_a_tun_device
            a_packet_path_and_its_peers_change_in_place
            a_packet_path_goes_with_its_device
            a_packet_path_stays_while_its_device_is_down
            peers_go_with_their_packet_path
            what_no_packet_path_can_be_is_rejected
            what_needs_a_failed_packet_path_is_skipped
            an_overlay_is_claimed_by_one_at_a_time
            a_claim_is_handed_over_on_request
        }
    };
    (@as tests $run:path; $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $run(|fixture| Box::pin($crate::conformance::kernel::$name(fixture)));
            }
        )*
    };
    (@as table; $($name:ident)*) => {
        &[$((stringify!($name), |fixture| Box::pin($crate::conformance::kernel::$name(fixture)))),*]
    };
    ($run:path) => {
        $crate::kernel_conformance! { @list tests $run }
    };
}

/// Every promise with its name, which is that of the function.
pub const PROMISES: &[(&str, Promise)] = kernel_conformance!(@list table);

/// Runs every promise on a fixture of its own and returns its name with the outcome, in order.
pub async fn all<F, Fut>(fixture: F) -> Vec<(&'static str, Outcome)>
where
    F: Fn() -> Fut + Send + Sync,
    Fut: Future<Output = Result<KernelFixture, String>> + Send,
{
    let mut outcomes = Vec::with_capacity(PROMISES.len());
    for (name, promise) in PROMISES {
        let outcome = match fixture().await {
            Ok(fixture) => promise(&fixture).await,
            Err(reason) => Err(format!("no fixture: {reason}")),
        };
        outcomes.push((*name, outcome));
    }
    outcomes
}
