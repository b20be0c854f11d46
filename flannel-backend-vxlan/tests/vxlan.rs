//! What a VXLAN node publishes and builds: flannel's formats and devices.
#![allow(missing_docs, reason = "tests")]

use std::net::IpAddr;
use std::sync::Arc;

use flannel_backend_vxlan::{ChecksumOffload, VxlanBackend, VxlanData};
use flannel_core::{
    AddressInfo, Backend, BackendData, BackendType, DualStack, Family, Features, IfName, Interface,
    Lease, LeaseAttrs, LeaseKey, Link, LinkInfo, LinkKind, MAIN_TABLE, MacAddr, Network,
    NetworkConfig, NodeContext, NodeId, Object, Observed, OverlayName, PoolMode, PublicIp,
    Rejection, Revision, Route, RoutePath, RouteProtocol, RouteTarget, Subnet, Underlay,
    UnderlayOptions, Vxlan,
};
use flannel_testkit::conformance::backend::{Input, all};
use proptest::prelude::*;

const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48",
    "Backend":{"Type":"vxlan"}}"#;
const V4: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// What a [`NodeContext`] borrows.
struct Fixture {
    config: NetworkConfig,
    underlay: Arc<Underlay>,
    features: Features,
    observed: Observed,
    held: Option<Lease>,
    previous: Option<Lease>,
    mtu: u32,
    options: UnderlayOptions,
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn dev(name: &str) -> IfName {
    IfName::new(name).expect("a device name")
}

fn address(ip: IpAddr, prefix_len: u8) -> AddressInfo {
    AddressInfo {
        dev: dev("eth0"),
        ip,
        prefix_len,
        link_scope: false,
        deprecated: false,
        permanent: true,
        temporary: false,
        tentative: false,
    }
}

fn route(dst: &str, target: RouteTarget) -> Route {
    let (table, metric, protocol) = (MAIN_TABLE, 0, RouteProtocol::KERNEL);
    Route {
        table,
        dst: dst.parse().expect("a subnet"),
        metric,
        target,
        protocol,
        source: None,
    }
}

impl Fixture {
    fn new(config: &str) -> Self {
        let eth0 = LinkInfo {
            name: dev("eth0"),
            index: 2,
            mtu: 1500,
            up: true,
            running: true,
            loopback: false,
            mac: None,
            master: None,
        };
        let gateway = RouteTarget::Gateway {
            gateway: ip("192.0.2.254"),
            dev: dev("eth0"),
            onlink: false,
        };
        Self {
            config: NetworkConfig::from_json(config, PoolMode::Allocated).expect("valid"),
            underlay: Arc::new(Underlay {
                links: vec![eth0],
                addresses: vec![address(ip("192.0.2.1"), 24), address(ip("2001:db8::1"), 64)],
                routes: vec![
                    route("0.0.0.0/0", gateway),
                    route("192.0.2.0/24", RouteTarget::Device(dev("eth0"))),
                    route("2001:db8::/64", RouteTarget::Device(dev("eth0"))),
                ],
                ..Underlay::default()
            }),
            features: Features::all(),
            observed: Observed::default(),
            held: None,
            previous: None,
            mtu: 1500,
            options: UnderlayOptions::default(),
        }
    }

    fn with<T>(&self, f: impl FnOnce(&NodeContext<'_>) -> T) -> T {
        let families: Vec<Family> = self.config.families().collect();
        let mut external = self
            .underlay
            .choose(&self.options, &families)
            .expect("eth0");
        external.mtu = self.mtu;
        f(&NodeContext {
            overlay: &OverlayName::default(),
            node: &NodeId::new("node-1").expect("a node id"),
            config: &self.config,
            external: &external,
            underlay: &self.underlay,
            features: &self.features,
            observed: &self.observed,
            held: self.held.as_ref(),
            previous: self.previous.as_ref(),
        })
    }

    fn attrs(&self) -> LeaseAttrs {
        self.with(|cx| VxlanBackend::new().attrs(cx))
            .expect("attributes")
    }

    fn network_by(&self, backend: &VxlanBackend) -> Arc<dyn Network> {
        let lease = own(self.attrs(), &self.config);
        self.with(|cx| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .expect("a runtime");
            runtime
                .block_on(backend.register_network(cx, lease))
                .expect("a network")
        })
    }

    fn network(&self) -> Arc<dyn Network> {
        self.network_by(&VxlanBackend::new())
    }
}

fn own(attrs: LeaseAttrs, config: &NetworkConfig) -> Lease {
    let subnets = config
        .pools()
        .map(|_, pool| pool.range().expect("allocated").0);
    lease("node-1", subnets, attrs)
}

fn lease(node: &str, subnet: DualStack<Subnet>, attrs: LeaseAttrs) -> Lease {
    Lease {
        key: LeaseKey::new(node),
        node: NodeId::new(node).expect("a node id"),
        instance: None,
        subnet,
        attrs,
        ttl: None,
        created: Revision(1),
        revision: Revision(1),
    }
}

fn data(vni: u32, mac: &str) -> BackendData {
    let vtep_mac = mac.parse().expect("a MAC address");
    VxlanData { vni, vtep_mac }.encode().expect("valid")
}

fn peer() -> Lease {
    let subnets = DualStack::both(
        "10.5.2.0/24".parse().expect("a subnet"),
        "fd00:5:0:2::/64".parse().expect("a subnet"),
    );
    let attrs = LeaseAttrs {
        public_ip: PublicIp::both(
            "192.0.2.2".parse().expect("an address"),
            "2001:db8::2".parse().expect("an address"),
        ),
        backend_type: Some(BackendType::vxlan()),
        backend_data: DualStack::both(data(1, "0e:00:00:00:00:02"), data(1, "0e:00:00:00:06:02")),
    };
    lease("node-2", subnets, attrs)
}

fn texts(objects: &[Object]) -> Vec<String> {
    objects.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn every_law_of_backends_is_kept() {
    let direct = DUAL.replace(r#""vxlan""#, r#""vxlan","DirectRouting":true"#);
    for (config, overhead) in [(DUAL, 50), (V4, 50), (&direct, 50)] {
        let backend = VxlanBackend::new();
        let input = Input::new(&backend, config, overhead).expect("a valid config");
        for (law, outcome) in all(&backend, &input).await {
            outcome.unwrap_or_else(|how| panic!("{law}: {how}"));
        }
    }
}

#[test]
fn backend_data_is_written_as_flannel_writes_it() {
    let data = data(1, "c6:d2:32:6f:8f:44");
    assert_eq!(data.as_json(), r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#);
}

#[test]
fn backend_data_is_read_as_flannel_reads_it() {
    let mac = "c6:d2:32:6f:8f:44".parse().expect("a MAC address");
    for text in [
        r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#,
        r#" { "vtepmac" : "C6-D2-32-6F-8F-44", "vni" : 1 } "#,
        r#"{"VNI":7,"VNI":1,"VtepMAC":"c6d2.326f.8f44","More":[1,{}]}"#,
        r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44","VtepMAC":null}"#,
    ] {
        let data = BackendData::from_json(text).expect("JSON");
        assert_eq!(
            VxlanData::decode(&data),
            Ok(VxlanData {
                vni: 1,
                vtep_mac: mac
            }),
            "{text}"
        );
    }
}

#[test]
fn malformed_backend_data_is_refused() {
    for text in [
        "null",
        "[]",
        r#""x""#,
        "{}",
        r#"{"VNI":1}"#,
        r#"{"VNI":-1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#,
        r#"{"VNI":4294967296,"VtepMAC":"c6:d2:32:6f:8f:44"}"#,
        r#"{"VNI":1,"VtepMAC":""}"#,
        r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#,
        r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#,
        r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#,
        r#"{"VNI":1,"VtepMAC":"02:00:5e:10:00:00:00:01"}"#,
        r#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:4g"}"#,
    ] {
        let data = BackendData::from_json(text).expect("JSON");
        assert!(VxlanData::decode(&data).is_err(), "{text}");
    }
}

#[test]
fn the_lease_is_flannels() {
    let attrs = Fixture::new(DUAL).attrs();
    let value =
        flannel_core::wire::lease_value(&NodeId::new("node-1").expect("an id"), None, &attrs)
            .expect("it can be written");
    let mac = |family: Family| {
        let data = attrs.backend_data.get(family).expect("both families");
        VxlanData::decode(data).expect("valid").vtep_mac
    };
    assert_eq!(
        value,
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan","#.to_string()
            + &format!(
                r#""BackendData":{{"VNI":1,"VtepMAC":"{}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{}"}},"#,
                mac(Family::V4),
                mac(Family::V6)
            )
            + r#""NodeID":"node-1"}"#
    );
}

#[test]
fn the_node_itself_gets_flannels_devices() {
    let fixture = Fixture::new(DUAL);
    let objects = fixture.network().local();
    let attrs = fixture.attrs();
    let mac = |family| {
        VxlanData::decode(attrs.backend_data.get(family).expect("both"))
            .expect("valid")
            .vtep_mac
    };
    assert_eq!(
        texts(&objects),
        [
            format!(
                "link flannel.1 type vxlan id 1 port 8472 dev eth0 local 192.0.2.1 mtu 1450 \
                 address {} up alias \"flannel:flannel\"",
                mac(Family::V4)
            ),
            "sysctl flannel.1 IPv6 accept_ra = 0".to_owned(),
            "address 10.5.1.0/32 dev flannel.1".to_owned(),
            format!(
                "link flannel-v6.1 type vxlan id 1 port 8472 dev eth0 local 2001:db8::1 mtu 1430 \
                 address {} up alias \"flannel:flannel\"",
                mac(Family::V6)
            ),
            "sysctl flannel-v6.1 IPv6 accept_ra = 0".to_owned(),
            "sysctl flannel-v6.1 IPv6 disable_ipv6 = 0".to_owned(),
            "address fd00:5:0:1::/128 dev flannel-v6.1".to_owned(),
        ]
    );
}

#[test]
fn a_peer_takes_four_objects_per_family() {
    let peer = peer();
    let network = Fixture::new(DUAL).network();
    let plans = network.peer(&peer, &peer.subnet);
    let v4 = plans.v4.expect("asked for").expect("accepted");
    let Some(Object::Nexthop(nexthop)) = v4.get(2) else {
        panic!("{v4:?}");
    };
    assert_eq!(
        texts(&v4),
        [
            "fdb 0e:00:00:00:00:02 dst 192.0.2.2 dev flannel.1".to_owned(),
            "neighbour 10.5.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1".to_owned(),
            format!("nexthop {} via 10.5.2.0 dev flannel.1 onlink", nexthop.id),
            format!("route 10.5.2.0/24 nhid {}", nexthop.id),
        ]
    );
    let v6 = plans.v6.expect("asked for").expect("accepted");
    assert!(texts(&v6)[0].contains("0e:00:00:00:06:02 dst 2001:db8::2 dev flannel-v6.1"));
}

#[test]
fn without_nexthop_objects_routes_are_flannels_own() {
    let mut fixture = Fixture::new(V4);
    let peer = peer();
    let subnets = DualStack::v4("10.5.2.0/24".parse().expect("a subnet"));
    let expected = "route 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink";
    let by_option = fixture.network_by(&VxlanBackend::new().with_nexthops(false));
    fixture.features.nexthops = false;
    for network in [by_option, fixture.network()] {
        let plan = network
            .peer(&peer, &subnets)
            .v4
            .expect("asked for")
            .expect("accepted");
        assert_eq!(texts(&plan)[2], expected);
        assert!(network.notes().iter().any(|note| note.topic == "nexthops"));
    }
}

#[test]
fn direct_routing_needs_no_tunnel_on_a_common_link() {
    let config = DUAL.replace(r#""vxlan""#, r#""vxlan","DirectRouting":true"#);
    let network = Fixture::new(&config).network();
    let mut peer = peer();
    let plan = network
        .peer(&peer, &peer.subnet)
        .v4
        .expect("asked for")
        .expect("accepted");
    assert_eq!(plan.len(), 2, "{plan:?}");
    assert!(
        texts(&plan)[0].ends_with("via 192.0.2.2 dev eth0"),
        "{plan:?}"
    );
    peer.attrs.public_ip.v4 = Some([198, 51, 100, 9].into());
    let plan = network
        .peer(&peer, &peer.subnet)
        .v4
        .expect("asked for")
        .expect("accepted");
    assert_eq!(plan.len(), 4, "behind a router it takes the tunnel");
}

#[test]
fn the_mac_is_held_then_found_then_remembered_then_derived() {
    let mut fixture = Fixture::new(V4);
    let mac = |fixture: &Fixture| {
        VxlanData::decode(&fixture.attrs().backend_data.v4.expect("v4"))
            .expect("valid")
            .vtep_mac
    };
    let derived = mac(&fixture);
    assert!(derived.is_unicast() && derived.0[0] & 2 == 2, "{derived}");
    assert_eq!(mac(&fixture), derived, "the same again");

    let with = |mac: &str| {
        let attrs = LeaseAttrs {
            backend_data: DualStack::v4(data(1, mac)),
            ..LeaseAttrs::default()
        };
        lease(
            "node-1",
            DualStack::v4("10.5.1.0/24".parse().expect("a subnet")),
            attrs,
        )
    };
    fixture.previous = Some(with("0e:00:00:00:00:aa"));
    assert_eq!(mac(&fixture).to_string(), "0e:00:00:00:00:aa");

    let found: MacAddr = "0e:00:00:00:00:bb".parse().expect("a MAC address");
    let link = |vni| {
        Object::Link(Link {
            name: dev("flannel.1"),
            kind: LinkKind::Vxlan(Vxlan {
                vni,
                port: 8472,
                underlay: Some(dev("eth0")),
                local: None,
                learning: false,
                gbp: false,
            }),
            mtu: Some(1450),
            mac: Some(found),
            up: true,
            alias: None,
        })
    };
    fixture.observed.objects.insert(link(2).key(), link(2));
    assert_eq!(
        mac(&fixture).to_string(),
        "0e:00:00:00:00:aa",
        "a device of another VNI is not it"
    );
    fixture.observed.objects.insert(link(1).key(), link(1));
    assert_eq!(mac(&fixture), found);

    fixture.held = Some(with("0e:00:00:00:00:cc"));
    assert_eq!(
        mac(&fixture).to_string(),
        "0e:00:00:00:00:cc",
        "repaired, not followed"
    );
}

#[test]
fn the_device_has_the_mac_that_the_lease_publishes() {
    let fixture = Fixture::new(V4);
    let mut lease = own(fixture.attrs(), &fixture.config);
    lease.attrs.backend_data = DualStack::v4(data(1, "0e:00:00:00:00:dd"));
    let network = fixture.with(|cx| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        runtime
            .block_on(VxlanBackend::new().register_network(cx, lease))
            .expect("a network")
    });
    assert!(texts(&network.local())[0].contains("address 0e:00:00:00:00:dd"));
}

#[test]
fn behind_nat_packets_are_sent_from_the_address_that_the_host_has() {
    let mut fixture = Fixture::new(V4);
    fixture.options.interfaces = vec![Interface::Name(dev("eth0"))];
    fixture.options.public_ip = PublicIp::v4([203, 0, 113, 7].into());
    assert_eq!(fixture.attrs().public_ip, fixture.options.public_ip);
    let link = texts(&fixture.network().local()).remove(0);
    assert!(link.contains("local 192.0.2.1"), "{link}");
}

#[test]
fn rejections_name_what_is_wrong() {
    let network = Fixture::new(V4).network();
    let subnets = DualStack::v4("10.5.2.0/24".parse().expect("a subnet"));
    let rejection = |lease: &Lease| network.peer(lease, &subnets).v4.expect("asked for");
    let mut other = peer();
    other.attrs.backend_data.v4 = Some(data(2, "0e:00:00:00:00:02"));
    let text = rejection(&other).expect_err("another VNI").to_string();
    assert!(text.contains("its VNI is 2, ours is 1"), "{text}");
    other.attrs.backend_data.v4 = None;
    assert!(matches!(
        rejection(&other),
        Err(Rejection::BackendData { .. })
    ));
    other.attrs.backend_data.v4 = Some(BackendData::from_json("null").expect("JSON"));
    assert!(matches!(
        rejection(&other),
        Err(Rejection::BackendData { .. })
    ));
}

#[test]
fn the_mtu_leaves_room_and_a_larger_one_is_cut() {
    let mut fixture = Fixture::new(DUAL);
    assert_eq!(fixture.network().mtu(), 1430);
    fixture.mtu = 9000;
    assert_eq!(fixture.network().mtu(), 8930);
    let config = V4.replace(r#""vxlan""#, r#""vxlan","MTU":1400"#);
    fixture = Fixture::new(&config);
    assert_eq!(fixture.network().mtu(), 1350, "the outer MTU is set");
    let config = V4.replace(r#""vxlan""#, r#""vxlan","MTU":9000"#);
    fixture = Fixture::new(&config);
    let network = fixture.network();
    assert_eq!(network.mtu(), 1450, "what the interface carries counts");
    assert!(network.notes().iter().any(|note| note.topic == "mtu"));
}

#[test]
fn config_errors_name_key_value_and_rule() {
    let cases = [
        (r#""vxlan","VNI":16777216"#, "Backend.VNI = 16777216"),
        (r#""vxlan","VNI":0"#, "Backend.VNI = 0"),
        (r#""vxlan","VNI":10000000"#, "at most 9999999"),
        (r#""vxlan","Port":65536"#, "Backend.Port = 65536"),
        (r#""vxlan","MTU":600"#, "Backend.MTU = 600"),
        (r#""vxlan","GBP":1"#, "Backend.GBP"),
    ];
    for (backend, expected) in cases {
        let fixture = Fixture::new(&V4.replace(r#""vxlan""#, backend));
        let error = fixture
            .with(|cx| VxlanBackend::new().attrs(cx))
            .expect_err(backend);
        let source =
            std::error::Error::source(&error).map_or_else(String::new, ToString::to_string);
        assert!(source.contains(expected), "{source}");
    }
}

#[test]
fn a_family_that_does_not_work_here_costs_the_other_nothing() {
    let mut fixture = Fixture::new(DUAL);
    fixture.mtu = 1300;
    let network = fixture.network();
    let why = network.lacks().v6.expect("IPv6 needs 1280 bytes");
    assert!(why.contains("1350"), "{why}");
    let local = network.local();
    let links = local
        .iter()
        .filter(|object| matches!(object, Object::Link(_)));
    assert_eq!(
        links.filter_map(Object::dev).collect::<Vec<_>>(),
        [dev("flannel.1")]
    );
    assert_eq!(network.mtu(), 1250);
    let data = fixture.attrs().backend_data;
    assert!(
        data.has(Family::V6),
        "Go flannel passes over records without"
    );

    let mut fixture = Fixture::new(DUAL);
    fixture.features.ipv6 = false;
    let why = fixture.network().lacks().v6.expect("it is switched off");
    assert!(why.contains("disable_ipv6"), "{why}");

    let mut fixture = Fixture::new(V4);
    fixture.mtu = 600;
    let error = fixture.with(|cx| VxlanBackend::new().attrs(cx));
    let error = error.expect_err("no family works").to_string();
    assert!(error.contains("626"), "{error}");
}

#[test]
fn a_tunnel_over_several_interfaces_is_bound_to_its_address_alone() {
    let mut fixture = Fixture::new(V4);
    let Some(underlay) = Arc::get_mut(&mut fixture.underlay) else {
        panic!("nobody else has it");
    };
    let eth0 = underlay.links[0].clone();
    underlay.links.push(LinkInfo {
        name: dev("eth1"),
        index: 3,
        mtu: 1400,
        ..eth0
    });
    let path = |last, to| RoutePath {
        gateway: Some(ip(&format!("192.0.2.{last}"))),
        dev: dev(to),
    };
    let paths = vec![path(254, "eth0"), path(253, "eth1")];
    underlay.routes[0].target = RouteTarget::Paths(paths);
    let families = [Family::V4];
    let external = underlay.choose(&fixture.options, &families).expect("both");
    assert_eq!((external.others, external.mtu), (vec![dev("eth1")], 1400));
    let local = fixture.network().local();
    let Some(Object::Link(Link {
        kind: LinkKind::Vxlan(vxlan),
        ..
    })) = local.first()
    else {
        panic!("the first is the device: {local:?}");
    };
    assert_eq!((vxlan.underlay, vxlan.local), (None, Some(ip("192.0.2.1"))));
}

#[test]
fn checksum_offload_follows_policy_and_kernel_with_the_reason() {
    let mut fixture = Fixture::new(V4);
    let offload = |fixture: &Fixture, policy| {
        let network = fixture.network_by(&VxlanBackend::new().with_checksum_offload(policy));
        let on = network.local().into_iter().find_map(|object| match object {
            Object::Offload(offload) => Some(offload.on),
            _ => None,
        });
        let note = network
            .notes()
            .into_iter()
            .find(|note| note.topic == "checksum-offload");
        (on, note.expect("always told").text)
    };
    "6.1.0-18-amd64".clone_into(&mut fixture.features.release);
    assert_eq!(offload(&fixture, ChecksumOffload::Auto).0, None);
    "5.4.0-42-generic".clone_into(&mut fixture.features.release);
    let (on, why) = offload(&fixture, ChecksumOffload::Auto);
    assert_eq!(on, Some(false));
    assert!(why.contains("5.7"), "{why}");
    assert_eq!(offload(&fixture, ChecksumOffload::On).0, Some(true));
    assert_eq!(offload(&fixture, ChecksumOffload::Off).0, Some(false));
    fixture.features.offloads = false;
    let (on, why) = offload(&fixture, ChecksumOffload::Off);
    assert_eq!(on, None);
    assert!(why.contains("does not let"), "{why}");
}

proptest! {
    #[test]
    fn hostile_backend_data_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(text) = std::str::from_utf8(&bytes)
            && let Ok(data) = BackendData::from_json(text) {
                let _ = VxlanData::decode(&data);
            }
    }

    #[test]
    fn backend_data_survives_the_wire(vni in 0_u32..1 << 24, mac in any::<[u8; 6]>()) {
        let vtep_mac = MacAddr([mac[0] & 0xfe | 2, mac[1], mac[2], mac[3], mac[4], mac[5]]);
        let data = VxlanData { vni, vtep_mac };
        prop_assert_eq!(VxlanData::decode(&data.encode().expect("valid")), Ok(data));
    }
}
