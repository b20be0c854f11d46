//! Annotations as Go flannel writes them, and Nodes as anybody may spoil them.

use flannel_core::{
    BackendData, BackendType, DualStack, Family, Lease, LeaseAttrs, PublicIp, Revision,
};
use flannel_subnet_kube::record::{self, Network};
use flannel_subnet_kube::{Annotation, AnnotationPrefix, NodeView, Splitter};
use flannel_testkit::strategies;
use proptest::prelude::*;
use serde_json::{Value, json};

const PREFIX: &str = "flannel.alpha.coreos.com";

fn prefix() -> AnnotationPrefix {
    AnnotationPrefix::default()
}

fn view(node: &Value) -> NodeView {
    NodeView::from_json(node.to_string().as_bytes(), &prefix()).expect("a Node")
}

/// A Node as a kubelet and flannel leave it, with much that is none of our business.
fn node(annotations: &[(&str, &str)]) -> Value {
    let mut all = json!({
        "node.alpha.kubernetes.io/ttl": "0",
        "volumes.kubernetes.io/controller-managed-attach-detach": "true",
    });
    for (key, value) in annotations {
        all[format!("{PREFIX}/{key}")] = json!(value);
    }
    json!({
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": "node-1",
            "uid": "0a1b",
            "resourceVersion": "42",
            "creationTimestamp": "2026-11-21T16:41:08Z",
            "labels": {"kubernetes.io/hostname": "node-1"},
            "annotations": all,
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:metadata": {}}}],
        },
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]},
        "status": {
            "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "images": [{"names": ["a", "b"], "sizeBytes": 12}],
        },
    })
}

/// The annotations of a dual-stack VXLAN node, byte for byte as Go flannel writes them.
const VXLAN: [(&str, &str); 6] = [
    ("backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
    ("backend-type", "vxlan"),
    (
        "backend-v6-data",
        r#"{"VNI":1,"VtepMAC":"56:97:5c:01:02:03"}"#,
    ),
    ("kube-subnet-manager", "true"),
    ("public-ip", "192.0.2.1"),
    ("public-ipv6", "2001:db8::1"),
];

fn vxlan() -> LeaseAttrs {
    let data = |mac: &str| {
        let text = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
        BackendData::from_json(&text).expect("JSON")
    };
    LeaseAttrs {
        public_ip: PublicIp::both(
            [192, 0, 2, 1].into(),
            "2001:db8::1".parse().expect("an address"),
        ),
        backend_type: Some(BackendType::vxlan()),
        backend_data: DualStack::both(data("12:c6:65:89:b4:e3"), data("56:97:5c:01:02:03")),
    }
}

fn read(node: &Value) -> Lease {
    let lease = record::lease(&view(node)).expect("a record");
    lease.expect("a readable one")
}

/// Why a Node's record cannot be read.
fn fault(node: &Value) -> String {
    let lease = record::lease(&view(node)).expect("a record");
    let unreadable = lease.expect_err("not a readable one");
    assert_eq!(unreadable.key.as_str(), "node-1");
    assert_eq!(unreadable.revision, Revision(42));
    unreadable.reason
}

/// The annotations that a node comes to write, by their names.
fn written(node: &Value, attrs: &LeaseAttrs) -> Vec<(&'static str, Option<String>)> {
    let wanted = record::wanted(&view(node), attrs).expect("writable");
    wanted
        .into_iter()
        .map(|(annotation, value)| (annotation.name(), value))
        .collect()
}

#[test]
fn go_flannels_annotations_are_read_and_written_byte_for_byte() {
    let lease = read(&node(&VXLAN));
    assert_eq!(lease.attrs, vxlan());
    assert_eq!(lease.node.as_str(), "node-1");
    assert_eq!(lease.subnet.to_string(), "10.244.1.0/24,fd00:1::/64");
    assert_eq!((lease.created.0, lease.revision.0), (1_795_279_268, 42));

    let mut wanted = written(&node(&[]), &vxlan());
    wanted.sort_unstable();
    let golden = VXLAN.map(|(key, value)| (key, Some(value.to_owned())));
    assert_eq!(wanted, golden);
    // Nothing is written over what stands already.
    let wanted = record::wanted(&view(&node(&VXLAN)), &vxlan()).expect("writable");
    assert_eq!(record::differences(&view(&node(&VXLAN)), &wanted), []);
}

#[test]
fn each_backend_is_written_as_go_flannel_writes_it() {
    let some = |text: &str| Some(text.to_owned());
    // host-gw of IPv4: data that is null, and nothing of IPv6.
    let mut attrs = vxlan();
    attrs.backend_type = Some(BackendType::host_gw());
    attrs.backend_data = DualStack::default();
    attrs.public_ip.v6 = None;
    let host_gw = written(&node(&[]), &attrs);
    assert!(
        host_gw.contains(&("backend-data", some("null"))),
        "{host_gw:?}"
    );
    assert!(host_gw.contains(&("backend-v6-data", None)));
    assert!(host_gw.contains(&("public-ipv6", None)));
    // udp has no type.
    attrs.backend_type = None;
    assert!(written(&node(&[]), &attrs).contains(&("backend-type", some(""))));
    // VXLAN of IPv6 alone writes neither public-ip nor backend-data.
    let mut attrs = vxlan();
    attrs.public_ip.v4 = None;
    attrs.backend_data.v4 = None;
    let v6 = written(&node(&VXLAN), &attrs);
    assert!(v6.contains(&("backend-data", None)), "{v6:?}");
    assert!(v6.contains(&("public-ip", None)));
    assert!(v6.contains(&("public-ipv6", some("2001:db8::1"))));
}

#[test]
fn what_go_flannel_writes_for_nothing_is_read_as_nothing() {
    for (key, value) in [("backend-data", "null"), ("backend-data", "")] {
        let mut annotations = VXLAN.to_vec();
        annotations.retain(|(name, _)| *name != key);
        annotations.push((key, value));
        assert_eq!(read(&node(&annotations)).attrs.backend_data.v4, None);
    }
    let v6_only = [
        ("backend-type", "host-gw"),
        ("kube-subnet-manager", "true"),
        ("public-ip", "0.0.0.0"),
        ("public-ipv6", "2001:db8::1"),
    ];
    let lease = read(&node(&v6_only));
    assert_eq!(lease.attrs.public_ip.v4, None);
    assert!(lease.attrs.public_ip.v6.is_some());
}

#[test]
fn only_managed_nodes_are_records() {
    for managed in ["", "false", "True", "yes"] {
        let annotations = [("kube-subnet-manager", managed), ("public-ip", "192.0.2.1")];
        assert_eq!(record::lease(&view(&node(&annotations))), None, "{managed}");
    }
    assert_eq!(record::lease(&view(&node(&[]))), None);
}

#[test]
fn hostile_values_make_a_record_unreadable_and_say_which() {
    let huge = "9".repeat(1 << 20);
    let deep = "[".repeat(1 << 14);
    for (key, value, part) in [
        ("public-ip", "2001:db8::1", "public-ip"),
        ("public-ip", "192.0.2.1/24", "public-ip"),
        ("public-ip", &huge, "public-ip"),
        ("public-ipv6", "nowhere", "public-ipv6"),
        ("backend-type", "vx lan", "backend-type"),
        ("backend-type", &huge, "backend-type"),
        ("backend-data", "{", "backend-data"),
        ("backend-data", &deep, "backend-data"),
        ("backend-data", &huge, "backend-data"),
        ("backend-v6-data", "{}{}", "backend-v6-data"),
    ] {
        let mut annotations = VXLAN.to_vec();
        annotations.retain(|(name, _)| *name != key);
        annotations.push((key, value));
        let reason = fault(&node(&annotations));
        assert!(reason.starts_with(part), "{reason}");
        assert!(reason.len() < 400, "{} bytes of reason", reason.len());
    }
}

#[test]
fn pod_cidrs_are_taken_one_a_family_or_refused() {
    let with = |cidrs: Value| {
        let mut node = node(&VXLAN);
        node["spec"] = json!({"podCIDRs": cidrs});
        node
    };
    let subnets = |node: &Value| view(node).subnets.map(|subnets| subnets.to_string());
    let taken = subnets(&with(json!([
        "fd00:1::/64",
        "10.244.1.5/24",
        "10.244.9.0/24"
    ])));
    assert_eq!(taken, Ok("10.244.1.0/24,fd00:1::/64".to_owned()));
    let mut only_old = node(&VXLAN);
    only_old["spec"] = json!({"podCIDR": "10.244.7.0/24"});
    assert_eq!(subnets(&only_old), Ok("10.244.7.0/24".to_owned()));
    assert!(fault(&with(json!([]))).contains("podCIDR"));
    assert!(fault(&with(json!(["0.0.0.0/0"]))).contains("every address"));
    assert!(fault(&with(json!(["::/0"]))).contains("every address"));
    assert!(fault(&with(json!(["10.0.0.0/40"]))).contains("10.0.0.0/40"));
}

#[test]
fn an_operators_overwrite_is_published_instead_and_is_never_written() {
    let mut annotations = vec![("public-ip-overwrite", "203.0.113.9")];
    let wanted = written(&node(&annotations), &vxlan());
    assert!(wanted.contains(&("public-ip", Some("203.0.113.9".to_owned()))));
    assert!(wanted.iter().all(|(name, _)| !name.contains("overwrite")));
    annotations[0].1 = "everywhere";
    let refused = record::wanted(&view(&node(&annotations)), &vxlan());
    let reason = refused.expect_err("it is no address");
    assert!(reason.starts_with("public-ip-overwrite"), "{reason}");
    // Of a family that the node does not publish, nothing is.
    let mut attrs = vxlan();
    attrs.public_ip.v6 = None;
    attrs.backend_data.v6 = None;
    let wanted = written(&node(&[("public-ipv6-overwrite", "2001:db8::9")]), &attrs);
    assert!(wanted.contains(&("public-ipv6", None)));
}

#[test]
fn a_patch_names_what_differs_and_nothing_else() {
    let mut annotations = VXLAN.to_vec();
    annotations[4].1 = "192.0.2.7";
    let node = node(&annotations);
    let view = view(&node);
    let wanted = record::wanted(&view, &vxlan()).expect("writable");
    let differences = record::differences(&view, &wanted);
    let patch = record::patch(&view, &prefix(), &differences, Network::Unsaid, None);
    assert_eq!(
        patch,
        json!({"metadata": {
            "uid": "0a1b",
            "resourceVersion": "42",
            "annotations": {format!("{PREFIX}/public-ip"): "192.0.2.1"},
        }})
    );
    let now = Some("2026-11-21T16:41:08Z");
    let patch = record::patch(&view, &prefix(), &[], Network::Up, now);
    assert_eq!(
        patch,
        json!({
            "metadata": {"uid": "0a1b", "resourceVersion": "42"},
            "status": {"conditions": [{
                "type": "NetworkUnavailable",
                "status": "False",
                "reason": "FlannelIsUp",
                "message": "Flannel is running on this node",
                "lastHeartbeatTime": "2026-11-21T16:41:08Z",
                "lastTransitionTime": "2026-11-21T16:41:08Z",
            }]},
        })
    );
    let gone = record::differences(&view, &record::absent());
    let patch = record::patch(&view, &prefix(), &gone, Network::Down, None);
    let removed = patch["metadata"]["annotations"].as_object().expect("some");
    assert_eq!(removed.len(), 6);
    assert!(removed.values().all(Value::is_null));
    assert_eq!(patch["status"]["conditions"][0]["status"], "True");
}

#[test]
fn prefixes_are_flannels() {
    let key = |text: &str| {
        let prefix = AnnotationPrefix::new(text);
        prefix
            .map(|prefix| prefix.key(Annotation::BackendType))
            .ok()
    };
    for (given, wanted) in [
        (PREFIX, "flannel.alpha.coreos.com/backend-type"),
        (
            "flannel.alpha.coreos.com/",
            "flannel.alpha.coreos.com/backend-type",
        ),
        (
            "flannel.alpha.coreos.com/prefix",
            "flannel.alpha.coreos.com/prefix-backend-type",
        ),
        (
            "flannel.alpha.coreos.com/prefix-",
            "flannel.alpha.coreos.com/prefix-backend-type",
        ),
        ("org.com/9", "org.com/9-backend-type"),
    ] {
        assert_eq!(key(given).as_deref(), Some(wanted), "{given}");
    }
    // The last but one passes Go flannel, whose check looks at the end only.
    for bad in [
        "org",
        "org/",
        "org/prefix",
        "org.COM",
        "org.com/PREFIX",
        "a.b/c/d",
        "",
        "Org.flannel.io/",
        "a..b",
    ] {
        assert_eq!(key(bad), None, "{bad}");
    }
}

#[test]
fn what_has_no_name_or_version_is_no_node() {
    let prefix = prefix();
    for bad in [
        "",
        "{}",
        "[]",
        "null",
        "{\"metadata\":{}}",
        "{\"metadata\":{\"name\":\"\",\"resourceVersion\":\"1\"}}",
        "{\"metadata\":{\"name\":\"a\",\"resourceVersion\":\"one\"}}",
    ] {
        assert!(
            NodeView::from_json(bad.as_bytes(), &prefix).is_err(),
            "{bad}"
        );
    }
}

fn ips() -> impl Strategy<Value = PublicIp> {
    let v4 = proptest::option::of((1_u32..).prop_map(std::net::Ipv4Addr::from_bits));
    let v6 = proptest::option::of((1_u128..).prop_map(std::net::Ipv6Addr::from_bits));
    (v4, v6).prop_map(|(v4, v6)| PublicIp::new(v4, v6))
}

/// What any backend may publish: data that is null is the same as none.
fn attrs() -> impl Strategy<Value = LeaseAttrs> {
    let of_a_lease = strategies::leases::any_attrs();
    (of_a_lease, ips()).prop_map(|(mut attrs, public_ip)| {
        attrs.public_ip = public_ip;
        for family in Family::ALL {
            let data = attrs.backend_data.get_mut(family);
            *data = data.take().filter(|data| data.as_json() != "null");
        }
        attrs
    })
}

/// A Node with the annotations that are wanted of it.
fn applied(wanted: &record::Wanted) -> Value {
    let mut node = node(&[]);
    for (annotation, value) in wanted {
        if let Some(value) = value {
            node["metadata"]["annotations"][prefix().key(*annotation)] = json!(value);
        }
    }
    node
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(attrs in attrs()) {
        let wanted = record::wanted(&view(&node(&VXLAN)), &attrs).expect("no overwrite is set");
        let node = applied(&wanted);
        prop_assert_eq!(read(&node).attrs, attrs.clone());
        let again = record::wanted(&view(&node), &attrs).expect("no overwrite is set");
        prop_assert_eq!(record::differences(&view(&node), &again), []);
    }

    #[test]
    fn no_annotation_panics_or_changes_another_family(
        key in proptest::sample::select(Annotation::ALL.to_vec()),
        value in "\\PC{0,64}|[0-9a-f:.]{0,24}|[\\[{\"]{0,40}",
    ) {
        let name = key.name();
        let mut annotations = VXLAN.to_vec();
        annotations.retain(|(other, _)| *other != name);
        annotations.push((name, &value));
        let node = view(&node(&annotations));
        if let Some(Ok(lease)) = record::lease(&node) {
            let usual = vxlan();
            let left = match key {
                Annotation::PublicIp(family) | Annotation::BackendData(family) => {
                    let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
                    vec![other]
                }
                _ => Family::ALL.to_vec(),
            };
            for family in left {
                prop_assert_eq!(lease.attrs.public_ip(family), usual.public_ip(family));
                prop_assert_eq!(
                    lease.attrs.backend_data.get(family),
                    usual.backend_data.get(family)
                );
            }
        }
        record::wanted(&node, &vxlan()).ok();
        record::node_public_ip(&node).ok();
    }

    #[test]
    fn bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        NodeView::from_json(&bytes, &prefix()).ok();
        let (mut stream, mut list) = (Splitter::stream(), Splitter::list());
        stream.feed(&bytes, |_| {}).ok();
        list.feed(&bytes, |_| {}).ok();
    }

    #[test]
    fn a_list_is_taken_apart_however_it_arrives(
        names in proptest::collection::vec("[a-z\\[\\]{}\",\\\\]{0,12}", 0..6),
        pieces in proptest::collection::vec(1_usize..40, 1..80),
        pretty in any::<bool>(),
    ) {
        let items: Vec<Value> = names
            .iter()
            .map(|name| json!({"metadata": {"name": name, "items": [{"x": name}]}}))
            .collect();
        let list = json!({
            "kind": "NodeList",
            "other": {"items": [{"not": "one"}], "text": "items"},
            "items": items.clone(),
            "metadata": {"resourceVersion": "7"},
        });
        let text = if pretty {
            serde_json::to_string_pretty(&list).expect("JSON")
        } else {
            list.to_string()
        };
        let found = split(Splitter::list(), text.as_bytes(), &pieces);
        let (found, splitter) = found;
        prop_assert!(splitter.is_complete());
        prop_assert_eq!(found, items.clone());
        let rest: Value = serde_json::from_slice(splitter.rest()).expect("the rest is JSON");
        let mut without = list;
        without["items"] = json!([]);
        prop_assert_eq!(rest, without);

        let lines: String = items.iter().map(|item| format!("{item}\n")).collect();
        let (found, splitter) = split(Splitter::stream(), lines.as_bytes(), &pieces);
        prop_assert!(splitter.is_complete());
        prop_assert_eq!(found, items);
    }
}

fn split(mut splitter: Splitter, mut bytes: &[u8], pieces: &[usize]) -> (Vec<Value>, Splitter) {
    let mut found = Vec::new();
    let mut pieces = pieces.iter().cycle();
    while !bytes.is_empty() {
        let len = pieces.next().map_or(1, |len| (*len).min(bytes.len()));
        let (piece, rest) = bytes.split_at(len);
        let take = |object: Vec<u8>| found.push(serde_json::from_slice(&object).expect("JSON"));
        splitter.feed(piece, take).expect("sound JSON");
        bytes = rest;
    }
    (found, splitter)
}
