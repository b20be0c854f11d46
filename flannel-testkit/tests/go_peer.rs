//! The Go peer does what the facts about Go flannel say, and nothing that we write harms it. The
//! numbers are the sections of the facts, letters those of the weaknesses.

use std::sync::Arc;
use std::time::Duration;

use flannel_core::{
    BackendData, BackendType, DualStack, LeaseAttrs, LeaseRequest, Manager, NodeId, PublicIp,
    Revision, Subnet, TokioClock, wire,
};
use flannel_testkit::fake_store::{
    CallFault, Cut, FakeStore, KeyEvent, KeyRange, Layout, Silence, StoreManager, StoreOptions,
};
use flannel_testkit::go_peer::{
    GoMode, GoOptions, GoPeer, GoReads, GoState, parse, parse_key, read_record,
};
use tokio::time::{advance, sleep};

const V4: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;
const DUAL: &str = r#"{"Network":"10.5.0.0/20","SubnetLen":24,"EnableIPv6":true,
    "IPv6Network":"fd00:5::/60","Backend":{"Type":"vxlan"}}"#;
const PREFIX: &str = Layout::DEFAULT_PREFIX;
const VALUE: &str = r#"{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
const DUAL_VALUE: &str = r#"{"PublicIP":"192.0.2.9","PublicIPv6":"2001:db8::9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}"#;
const HOUR: Duration = Duration::from_secs(3600);

// One record

#[test]
fn keys_are_read_as_the_table_says() {
    // 3.2
    for (key, nets) in [
        ("10.5.1.0-24", "10.5.1.0/24"),
        (
            "10.12.13.0-24&fd00:12:13::-56",
            "10.12.13.0/24 fd00:12:13::/56",
        ),
        ("junk10.5.1.0-24", "10.5.1.0/24"),
        ("/coreos.com/network/subnets/10.5.52.0-24", "10.5.52.0/24"),
        ("1.2.3.4.10.5.1.0-24", "10.5.1.0/24"),
        ("10.5.1.7-24", "10.5.1.7/24"),
        ("0.0.0.0-0", "0.0.0.0/0"),
        ("10.5.1.0-31", "10.5.1.0/31"),
        ("10.5.1.0-24&fd00::-127", "10.5.1.0/24 fd00::/127"),
        ("10.5.1.0-32", ""),
        ("10.5.1.0-24&fd00::-128", ""),
        ("10.5.1.0-24&FD00::-64", ""),
        ("10.5.1.0-24/extra", ""),
        ("10.5.1.0-24hi", ""),
        ("10.5.1.300-24", ""),
        ("10.5.01.0-24", ""),
        // 14.1
        ("10", ""),
        ("10.12.13.0", ""),
        ("10.12.13-24", ""),
        ("10.12.13.0-24&:12:13:-56", ""),
        ("10.12.13.0-24&20011::-56", ""),
        ("10.12.13.0-24&2001-56", ""),
        ("10.12.13.0-24&2001::", ""),
        ("10.12.13.0-24&2001::-56hi", ""),
        ("&2001::-56", ""),
        ("", ""),
    ] {
        let read = parse_key(key).map(|(v4, v6)| {
            let v6 = v6.map(|v6| format!(" {}/{}", v6.ip, v6.len));
            format!("{}/{}{}", v4.ip, v4.len, v6.unwrap_or_default())
        });
        assert_eq!(read.unwrap_or_default(), nets, "{key}");
    }
}

/// In a word what a node makes of a record.
fn word(mode: GoMode, key: &str, value: &str) -> &'static str {
    match read_record(mode, key, value.as_bytes()) {
        GoReads::Lease(_) => "lease",
        GoReads::Ignored { .. } => "ignored",
        GoReads::Error { .. } => "error",
        GoReads::Crash { .. } => "crash",
    }
}

#[test]
fn values_are_read_as_the_tables_say() {
    let vxlan = |data: &str| {
        format!(r#"{{"PublicIP":"192.0.2.9","BackendType":"vxlan","BackendData":{data}}}"#)
    };
    let mac = |mac: &str| vxlan(&format!(r#"{{"VNI":1,"VtepMAC":{mac}}}"#));
    let public = |ip: &str| {
        format!(
            r#"{{"PublicIPv6":{ip},"BackendType":"vxlan","BackendData":{{"VtepMAC":"c6:d2:32:6f:8f:44"}}}}"#
        )
    };
    for (value, expected) in [
        (VALUE.to_owned(), "lease"),
        // 3.1: the addresses
        (public("null"), "lease"),
        (public(r#""2001:db8::1""#), "lease"),
        (public(r#""192.0.2.1""#), "lease"),
        (public(r#""""#), "error"),
        (public("5"), "error"),
        (r#"{"PublicIP":null}"#.to_owned(), "error"),
        (r#"{"PublicIP":"2001:db8::1"}"#.to_owned(), "error"),
        (r#"{"PublicIP":"x"}"#.to_owned(), "error"),
        (r#"{"PublicIP":"192.0.2.1","BackendType":5}"#.to_owned(), "error"),
        // 13: order, case and further fields do not matter, other JSON does
        (
            r#"{"NodeID":"a","backenddata":{"vtepmac":"c6:d2:32:6f:8f:44","vni":1},"BACKENDTYPE":"vxlan"}"#
                .to_owned(),
            "lease",
        ),
        ("{".to_owned(), "error"),
        ("[]".to_owned(), "error"),
        (String::new(), "error"),
        ("null".to_owned(), "ignored"),
        ("{}".to_owned(), "ignored"),
        // 7.0: the lease filter
        (VALUE.replace("\"vxlan\"", "\"host-gw\""), "ignored"),
        (VALUE.replace("\"vxlan\"", "\"VXLAN\""), "ignored"),
        // 7.1 and 13: the backend's data
        (vxlan("null"), "ignored"),
        (vxlan("{}"), "ignored"),
        (vxlan("5"), "ignored"),
        (vxlan(r#"{"VNI":-1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#), "ignored"),
        (vxlan(r#"{"VNI":7,"VtepMAC":"c6:d2:32:6f:8f:44"}"#), "lease"),
        (r#"{"BackendType":"vxlan"}"#.to_owned(), "ignored"),
        (mac(r#""""#), "ignored"),
        (mac("null"), "ignored"),
        (mac("5"), "ignored"),
        (mac(r#""c6:d2:32:6f:8f""#), "ignored"),
        (mac(r#""c6:d2:32:6f:8f:4""#), "ignored"),
        (mac(r#""c6:d2:32:6f:8f-44""#), "ignored"),
        (mac(r#""c6-d2-32-6f-8f-44""#), "lease"),
        (mac(r#""c6d2.326f.8f44""#), "lease"),
        (mac(r#""C6:D2:32:6F:8F:44""#), "lease"),
        (mac(r#""ff:ff:ff:ff:ff:ff""#), "lease"),
        (mac(r#""c6:d2:32:6f:8f:44:55:66""#), "ignored"),
    ] {
        for mode in [GoMode::V4, GoMode::Dual] {
            let read = word(mode, "10.5.1.0-24", &value);
            assert_eq!(read, expected, "{mode:?}: {value}");
        }
    }
    // 3.2, B2: whatever the subnet is; the kernel alone refuses host bits.
    for (key, expected) in [
        ("0.0.0.0-0", "lease"),
        ("128.0.0.0-1", "lease"),
        ("192.168.0.0-16", "lease"),
        ("10.5.1.7-24", "ignored"),
        ("config-old", "error"),
    ] {
        assert_eq!(word(GoMode::V4, key, VALUE), expected, "{key}");
    }
}

#[test]
fn records_of_two_families_crash_as_the_table_says() {
    let key = "10.5.1.0-24&fd00:5:0:1::-64";
    let no_address = DUAL_VALUE.replace("\"2001:db8::9\"", "null");
    let other = DUAL_VALUE.replace("vxlan", "host-gw");
    for (mode, value, expected) in [
        (GoMode::Dual, DUAL_VALUE, "lease"),
        // B3: a method of the IPv6 device that is not there
        (GoMode::V4, DUAL_VALUE, "crash"),
        (GoMode::V4, &other, "ignored"),
        // 13: PublicIPv6 null, if the data can be read
        (GoMode::Dual, &no_address, "crash"),
        (GoMode::Dual, VALUE, "ignored"),
    ] {
        assert_eq!(word(mode, key, value), expected, "{mode:?}: {value}");
    }
}

#[cfg(feature = "proptest")]
mod laws {
    use super::*;
    use flannel_testkit::strategies::config::dual_subnet;
    use flannel_testkit::strategies::leases::{any_attrs, public_ip, vxlan_data};
    use proptest::prelude::*;

    /// The keys and values that are written for these: none if they cannot be.
    fn written(
        subnet: &DualStack<Subnet>,
        node: &NodeId,
        attrs: &LeaseAttrs,
    ) -> Option<(String, String)> {
        let key = wire::subnet_key(subnet).ok()?;
        Some((key, wire::lease_value(node, None, attrs).ok()?))
    }

    /// The mode of a cluster in which all leases have these families.
    fn mode(subnet: &DualStack<Subnet>) -> GoMode {
        match subnet.v6 {
            None => GoMode::V4,
            Some(_) => GoMode::Dual,
        }
    }

    fn subnet() -> impl Strategy<Value = DualStack<Subnet>> {
        dual_subnet().prop_filter("Go has no key for it", |subnet| {
            wire::subnet_key(subnet).is_ok()
        })
    }

    fn node() -> impl Strategy<Value = NodeId> {
        "[a-zA-Z0-9._:-]{1,40}".prop_filter_map("a node id", |id| NodeId::new(id).ok())
    }

    fn json(text: &str) -> serde_json::Value {
        serde_json::from_str(text).expect("JSON")
    }

    proptest! {
        #[test]
        fn go_reads_what_we_write((subnet, node, attrs) in (subnet(), node(), any_attrs())) {
            let Some((key, value)) = written(&subnet, &node, &attrs) else {
                return Ok(());
            };
            let lease = parse(&key, value.as_bytes()).map_err(TestCaseError::fail)?;
            prop_assert_eq!(lease.taken(), subnet);
            prop_assert_eq!(lease.v4.destination(), subnet.v4);
            prop_assert_eq!(lease.v6.and_then(|v6| v6.destination()), subnet.v6);
            let read = lease.attrs;
            prop_assert_eq!(Some(read.public_ip).filter(|ip| !ip.is_unspecified()), attrs.public_ip.v4
                .filter(|ip| !ip.is_unspecified()));
            prop_assert_eq!(read.public_ipv6, attrs.public_ip.v6);
            let backend = attrs.backend_type.as_ref().map_or("", BackendType::as_str);
            prop_assert_eq!(read.backend_type, backend);
            let data = read.backend_data.map(|_, text| json(text));
            prop_assert_eq!(data, attrs.backend_data.map(|_, data| json(data.as_json())));
        }

        #[test]
        fn go_nodes_of_our_families_route_to_an_honest_node(
            (subnet, node, public_ip, data4, data6) in
                (subnet(), node(), public_ip(), vxlan_data(), vxlan_data()),
        ) {
            let attrs = LeaseAttrs {
                public_ip,
                backend_type: Some(BackendType::vxlan()),
                backend_data: DualStack::new(Some(data4), subnet.v6.map(|_| data6)),
            };
            let (key, value) = written(&subnet, &node, &attrs).expect("written");
            let read = read_record(mode(&subnet), &key, value.as_bytes());
            prop_assert!(matches!(read, GoReads::Lease(_)), "{key} {value} is {read:?}");
        }

        #[test]
        fn no_bytes_panic(key in ".{0,60}", value in prop::collection::vec(any::<u8>(), 0..200)) {
            for mode in [GoMode::V4, GoMode::Dual] {
                let _ = read_record(mode, &key, &value);
            }
        }
    }
}

// The process

struct World {
    store: FakeStore,
}

impl World {
    fn new(config: &str) -> Self {
        let store = FakeStore::new(Arc::new(TokioClock::new()));
        store.put(format!("{PREFIX}/config"), config);
        Self { store }
    }

    fn go(&self, n: u8) -> GoPeer {
        self.go_with(n, GoOptions::default())
    }

    fn go_with(&self, n: u8, options: GoOptions) -> GoPeer {
        let name = format!("go-{n}");
        GoPeer::new(self.store.link(&name), &name, ip(n), options)
    }

    fn ours(&self, name: &str) -> StoreManager {
        StoreManager::new(self.store.link(name), StoreOptions::default())
    }

    fn key(end: &str) -> String {
        format!("{PREFIX}/subnets/{end}")
    }

    fn put(&self, end: &str, value: &str) {
        self.store.put_for(Self::key(end), value, 24 * HOUR);
    }

    fn value(&self, end: &str) -> String {
        let entries = self.store.entries(&KeyRange::key(Self::key(end)));
        String::from_utf8_lossy(&entries[0].value).into_owned()
    }

    fn ends(&self) -> Vec<String> {
        let entries = self.store.entries(&KeyRange::prefix(Self::key("")));
        let end = |key: &str| key[Self::key("").len()..].to_owned();
        entries.iter().map(|entry| end(&entry.key)).collect()
    }
}

fn ip(n: u8) -> PublicIp {
    let v6 = [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(n)];
    PublicIp::both([192, 0, 2, n].into(), v6.into())
}

/// What a node of ours asks for. One address per number, as for the Go nodes.
fn request(n: u8, mode: GoMode) -> LeaseRequest {
    let data = |n: u8| {
        let text = format!(r#"{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{n:02x}"}}"#);
        BackendData::from_json(&text).expect("JSON")
    };
    LeaseRequest::new(
        NodeId::new(format!("node-{n}")).expect("a node id"),
        LeaseAttrs {
            public_ip: ip(n),
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::new(
                Some(data(n)),
                (mode == GoMode::Dual).then(|| data(n + 100)),
            ),
        },
    )
}

fn subnets(list: &[&str]) -> DualStack<Subnet> {
    DualStack::of_subnets(
        list.iter()
            .map(|text| text.parse::<Subnet>().expect("a subnet")),
    )
}

fn routed(go: &GoPeer) -> Vec<String> {
    go.routes().iter().map(Subnet::to_string).collect()
}

/// Steps until nothing is left to do.
async fn settle(peers: &mut [&mut GoPeer]) {
    for _ in 0..3 {
        for peer in peers.iter_mut() {
            peer.step().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nodes_lease_what_the_config_allows_and_route_to_one_another() {
    for (config, families) in [(V4, 1), (DUAL, 2)] {
        let world = World::new(config);
        let mut nodes: Vec<GoPeer> = (1..=4).map(|n| world.go(n)).collect();
        for node in &mut nodes {
            node.step().await;
            assert_eq!(node.state(), GoState::Running);
        }
        settle(&mut nodes.iter_mut().collect::<Vec<_>>()).await;
        let held: Vec<_> = nodes.iter().map(|node| node.view().subnet()).collect();
        for (n, node) in nodes.iter().enumerate() {
            let mut others: Vec<String> = Vec::new();
            for (m, subnet) in held.iter().enumerate() {
                assert_eq!(subnet.values().count(), families);
                assert!(n == m || !subnet.overlaps(&held[n]));
                others.extend(subnet.values().filter(|_| n != m).map(Subnet::to_string));
            }
            let mut routes = routed(node);
            routes.sort();
            others.sort();
            assert_eq!(routes, others);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn its_record_is_go_flannels_byte_for_byte() {
    let world = World::new(V4);
    world.go(1).step().await;
    let value = world.value(&world.ends()[0]);
    let (start, end) = value.split_at(value.find("\"VtepMAC\":\"").expect("a MAC") + 11);
    let expected = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""#;
    assert_eq!((start, &end[17..]), (expected, "\"}}"));
    // 3.1: what the SDK writes for the same node without an id of its own is the same.
    let record = wire::parse_lease_value(value.as_bytes()).expect("a record");
    let again = wire::lease_value(&record.node_id().expect("an id"), None, &record.attrs);
    assert_eq!(again, Ok(value));
}

#[tokio::test(start_paused = true)]
async fn it_takes_over_any_lease_with_its_address() {
    // 3.4, step 2
    let world = World::new(V4);
    world.put("10.5.7.0-24", &VALUE.replace("192.0.2.9", "192.0.2.1"));
    let mut node = world.go(1);
    node.step().await;
    assert_eq!(node.view().subnet(), subnets(&["10.5.7.0/24"]));
    assert_eq!(world.ends(), ["10.5.7.0-24"]);
    assert!(
        !world.value("10.5.7.0-24").contains("c6:d2:32"),
        "with its own data"
    );

    // Not compatible: deleted, and still in the way.
    let world = World::new(V4);
    world.put("10.5.0.0-21", &VALUE.replace("192.0.2.9", "192.0.2.1"));
    let mut node = world.go(1);
    node.step().await;
    assert_eq!(world.ends().len(), 1);
    let held = node.view().subnet();
    assert!(!held.overlaps(&subnets(&["10.5.0.0/21"])), "{held}");
}

#[tokio::test(start_paused = true)]
async fn it_wants_its_previous_subnet_if_no_lease_is_just_that() {
    // 3.4, step 3; A3: an overlap does not count.
    for (there, previous, given) in [
        ("10.5.9.0-24", "10.5.7.0/24", true),
        ("10.5.7.0-24", "10.5.7.0/24", false),
        ("10.5.6.0-23", "10.5.7.0/24", true),
        ("10.5.9.0-24", "10.5.7.0/25", false),
        ("10.5.9.0-24", "10.6.7.0/24", false),
    ] {
        let world = World::new(V4);
        world.put(there, VALUE);
        let previous = subnets(&[previous]);
        let mut node = world.go_with(
            1,
            GoOptions {
                previous,
                ..GoOptions::default()
            },
        );
        node.step().await;
        assert_eq!(node.state(), GoState::Running);
        assert_eq!(
            node.view().subnet() == previous,
            given,
            "{previous} beside {there}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_race_ends_it() {
    // 3.4, quirk; A1
    let world = World::new(r#"{"Network":"10.5.0.0/22","SubnetLen":24,"SubnetMax":"10.5.1.0"}"#);
    let link = world.store.link("go");
    link.set_latency(Duration::from_secs(1));
    let mut node = GoPeer::new(link, "go", ip(1), GoOptions::default());
    // Config, list and grant take two seconds each; then it writes.
    let race = async {
        sleep(Duration::from_secs(5)).await;
        world.put("10.5.1.0-24", VALUE);
    };
    tokio::join!(biased; node.step(), race);
    let exited = GoState::Exited {
        code: 1,
        why: "subnet already exists".to_owned(),
    };
    assert_eq!(node.state(), exited);
    let mut full = world.go(2);
    full.step().await;
    assert!(matches!(full.state(), GoState::Exited { code: 1, why } if why == "out of subnets"));
}

#[tokio::test(start_paused = true)]
async fn a_dual_stack_node_crashes_when_it_allocates_beside_an_ipv4_lease() {
    // 13; A10
    let world = World::new(DUAL);
    world.put("10.5.9.0-24", VALUE);
    let mut node = world.go(1);
    node.step().await;
    assert!(
        matches!(node.state(), GoState::Crashed { .. }),
        "{:?}",
        node.state()
    );
    // One that has a lease does not.
    world.store.delete(World::key("10.5.9.0-24"));
    let mut node = world.go(1);
    node.step().await;
    world.put("10.5.9.0-24", VALUE);
    node.step().await;
    assert_eq!(node.state(), GoState::Running);
}

#[tokio::test(start_paused = true)]
async fn it_renews_whatever_is_there_an_hour_before_the_end() {
    // 3.3, 3.5; A4
    let world = World::new(V4);
    let node = world.go(1);
    let view = node.view();
    tokio::spawn(node.run());
    sleep(HOUR).await;
    let end = world.ends().remove(0);
    let value = world.value(&end);
    sleep(21 * HOUR).await;
    world.put(&end, VALUE);
    assert_eq!(world.value(&end), VALUE);
    // The new lease of the key has 24 hours, and it goes by that.
    sleep(22 * HOUR).await;
    assert_eq!(world.value(&end), VALUE);
    sleep(2 * HOUR).await;
    assert_eq!(world.value(&end), value, "over another's");
    sleep(100 * HOUR).await;
    assert_eq!(world.value(&end), value);
    assert_eq!(view.state(), GoState::Running);
    // A record without a lease is renewed at once.
    world.store.put(World::key(&end), VALUE);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.value(&end), value);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_its_record_ends_it_and_so_does_that_of_another_key_that_begins_so() {
    // 3.5; A7, A9
    for (more, ends) in [("", true), ("x10.5.9.0-24", true), ("x", false)] {
        let world = World::new(V4);
        let mut node = world.go(1);
        node.step().await;
        let end = world.ends().remove(0) + more;
        if !more.is_empty() {
            world.put(&end, VALUE);
            node.step().await;
        }
        world.store.delete(World::key(&end));
        node.step().await;
        let exited = matches!(node.state(), GoState::Exited { code: 0, .. });
        assert_eq!(exited, ends, "{end}: {:?}", node.state());
    }
}

#[tokio::test(start_paused = true)]
async fn one_unreadable_key_drops_every_route_until_the_others_renew() {
    // 3.7; B1
    for (key, value) in [
        (World::key("x"), "y"),
        (format!("{PREFIX}/subnets-old/x"), "y"),
        (World::key("10.5.9.0-24"), "{"),
        (World::key("10.5.9.0-24"), r#"{"PublicIP":null}"#),
    ] {
        let world = World::new(V4);
        let (mut one, mut two) = (world.go(1), world.go(2));
        settle(&mut [&mut one, &mut two]).await;
        assert_eq!(routed(&one).len(), 1);
        world.store.put(&key, value);
        settle(&mut [&mut one, &mut two]).await;
        assert_eq!(routed(&one).len(), 0, "{key}");
        let GoState::Emptied {
            key: blamed,
            unreadable: true,
            ..
        } = one.state()
        else {
            panic!("{key}: {:?}", one.state());
        };
        assert_eq!(blamed, key);
        advance(23 * HOUR).await;
        settle(&mut [&mut one, &mut two]).await;
        assert_eq!(routed(&one).len(), 1, "back with the renewal");
        assert!(
            matches!(one.state(), GoState::Emptied { .. }),
            "and not forgotten"
        );
    }
    // What is beside that prefix harms nobody.
    let world = World::new(V4);
    let mut node = world.go(1);
    node.step().await;
    world.store.put(format!("{PREFIX}/taken/x"), "y");
    node.step().await;
    assert_eq!(node.state(), GoState::Running);
}

#[tokio::test(start_paused = true)]
async fn one_failed_question_for_the_time_to_live_drops_every_route() {
    // 3.7; B1, C8
    let world = World::new(V4);
    world.put("10.5.8.0-24", VALUE);
    let link = world.store.link("go");
    let mut node = GoPeer::new(link.clone(), "go", ip(1), GoOptions::default());
    node.step().await;
    assert_eq!(routed(&node).len(), 1);
    link.fail_next(CallFault::LoseAnswer(Silence::Error));
    world.put("10.5.9.0-24", VALUE);
    node.step().await;
    assert_eq!(routed(&node).len(), 0);
    assert!(matches!(
        node.state(),
        GoState::Emptied {
            unreadable: false,
            ..
        }
    ));
}

#[tokio::test(start_paused = true)]
async fn a_change_while_it_was_behind_is_not_seen_but_other_subnets_are() {
    // 5.2; C1
    let world = World::new(V4);
    world.put("10.5.8.0-24", VALUE);
    world.put("10.5.9.0-24", VALUE);
    let mut node = world.go(1);
    node.step().await;
    world.store.delete(World::key("10.5.8.0-24"));
    world.put("10.5.9.0-24", &VALUE.replace("vxlan", "host-gw"));
    world.put("10.5.10.0-24", VALUE);
    world
        .store
        .compact(world.store.revision())
        .expect("compacted");
    node.step().await;
    assert_eq!(routed(&node), ["10.5.9.0/24", "10.5.10.0/24"]);
}

#[tokio::test(start_paused = true)]
async fn it_waits_for_the_future_of_a_store_that_went_back() {
    let world = World::new(V4);
    let backup = world.store.backup();
    let node = world.go(1);
    let view = node.view();
    tokio::spawn(node.run());
    sleep(HOUR).await;
    world.store.restore(&backup);
    world.put("10.5.9.0-24", VALUE);
    sleep(HOUR).await;
    assert!(view.routes().is_empty(), "deaf");
    assert_eq!(view.state(), GoState::Running);
    while world.store.revision() < Revision(9) {
        world.put("10.5.9.0-24", VALUE);
    }
    sleep(HOUR).await;
    assert_eq!(view.routes().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_start_without_a_store_waits_and_a_watch_that_breaks_is_opened_again() {
    let world = World::new(V4);
    let link = world.store.link("go");
    link.cut(Cut::Fail);
    let node = GoPeer::new(link.clone(), "go", ip(1), GoOptions::default());
    let view = node.view();
    tokio::spawn(node.run());
    sleep(HOUR).await;
    assert_eq!(view.state(), GoState::Starting);
    link.heal();
    sleep(HOUR).await;
    assert_eq!(view.state(), GoState::Running);
    for n in 5..=9 {
        link.cut(Cut::Fail);
        world.put(&format!("10.5.{n}.0-24"), VALUE);
        sleep(Duration::from_secs(30)).await;
        link.heal();
        sleep(Duration::from_secs(30)).await;
    }
    assert_eq!(view.routes().len(), 5);
    assert_eq!(view.state(), GoState::Running);
}

// Beside ours

#[tokio::test(start_paused = true)]
async fn ours_and_theirs_share_a_cluster_and_nothing_of_ours_harms_them() {
    for (config, mode) in [(V4, GoMode::V4), (DUAL, GoMode::Dual)] {
        let world = World::new(config);
        let (mut one, mut two) = (world.go(1), world.go(2));
        let ours = [11, 12, 13].map(|n| (world.ours(&format!("node-{n}")), request(n, mode)));
        let mut leases = Vec::new();
        for (manager, request) in &ours {
            one.step().await;
            leases.push(manager.acquire_lease(request).await.expect("a lease"));
            two.step().await;
        }
        settle(&mut [&mut one, &mut two]).await;
        let families = if mode == GoMode::Dual { 2 } else { 1 };
        assert_eq!(routed(&one).len(), 4 * families);
        for lease in &leases {
            for subnet in lease.subnet.values() {
                assert!(one.routes().contains(subnet) && two.routes().contains(subnet));
            }
        }
        // A life: renewed, with another address, released, asked for again.
        let (manager, request) = &ours[0];
        let mut lease = manager.renew_lease(&leases[0]).await.expect("renewed");
        lease.attrs.public_ip = ip(21);
        let lease = manager.renew_lease(&lease).await.expect("renewed");
        settle(&mut [&mut one, &mut two]).await;
        manager.release_lease(&lease).await.expect("released");
        settle(&mut [&mut one, &mut two]).await;
        assert_eq!(routed(&one).len(), 3 * families);
        manager.acquire_lease(request).await.expect("a lease");
        advance(25 * HOUR).await;
        settle(&mut [&mut one, &mut two]).await;

        for go in [&one, &two] {
            assert_eq!(
                go.state(),
                GoState::Exited {
                    code: 0,
                    why: "lease has been revoked".into()
                }
            );
        }
        for event in world
            .store
            .history(&KeyRange::prefix(format!("{PREFIX}/subnets")))
        {
            if let KeyEvent::Put(entry) = event {
                let read = read_record(mode, &entry.key, &entry.value);
                assert!(matches!(read, GoReads::Lease(_)), "{}: {read:?}", entry.key);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_of_ours_takes_over_from_go_flannel_and_gives_back() {
    let world = World::new(V4);
    let mut go = world.go(1);
    go.step().await;
    let subnet = go.view().subnet();
    drop(go);
    let manager = world.ours("node-1");
    let lease = manager
        .acquire_lease(&request(1, GoMode::V4))
        .await
        .expect("a lease");
    assert_eq!(lease.subnet, subnet);
    let mut go = world.go(1);
    go.step().await;
    assert_eq!((go.state(), go.view().subnet()), (GoState::Running, subnet));
    assert!(
        manager.renew_lease(&lease).await.is_err(),
        "it is theirs again"
    );
}
