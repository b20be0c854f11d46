//! Between a Node's annotations and a lease. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use flannel_core::{
    BackendData, BackendType, Family, Lease, LeaseAttrs, LeaseKey, NodeId, Revision, Unreadable,
};
use serde_json::{Map, Value, json};

use crate::node::NodeView;
use crate::prefix::{Annotation, AnnotationPrefix};

/// The lease that a Node stands for; nothing if it is no record: flannel does not run on it.
///
/// # Errors
/// [`Unreadable`] says which value is wrong. Such a record is there all the same.
pub fn lease(node: &NodeView) -> Option<Result<Lease, Unreadable>> {
    let managed = node.annotations.get(Annotation::Managed) == Some("true");
    managed.then(|| {
        read(node).map_err(|reason| Unreadable {
            key: LeaseKey::new(&node.name),
            revision: node.revision,
            reason,
        })
    })
}

fn read(node: &NodeView) -> Result<Lease, String> {
    let subnet = node.subnets.clone()?;
    if subnet.is_empty() {
        return Err("spec.podCIDR: none is assigned yet".to_owned());
    }
    let id = NodeId::new(&*node.name).map_err(|error| format!("metadata.name: {error}"))?;
    Ok(Lease {
        key: LeaseKey::new(&node.name),
        node: id,
        instance: None,
        subnet,
        attrs: attrs(node)?,
        ttl: None,
        created: Revision(node.created),
        revision: node.revision,
    })
}

fn attrs(node: &NodeView) -> Result<LeaseAttrs, String> {
    let wrong = |annotation: Annotation, value: &str, rule: &str| {
        let shown: String = value.chars().take(64).collect();
        format!("{} = {shown:?}: {rule}", annotation.name())
    };
    let mut attrs = LeaseAttrs::default();
    if let Some(name) = node.annotations.get(Annotation::BackendType)
        && !name.is_empty()
    {
        let kind = BackendType::new(name);
        attrs.backend_type =
            Some(kind.map_err(|error| wrong(Annotation::BackendType, name, &error.to_string()))?);
    }
    for family in Family::ALL {
        let annotation = Annotation::PublicIp(family);
        if let Some(text) = node.annotations.get(annotation) {
            let ip = public_ip(family, text);
            let rule = format!("must be an {family} address");
            let ip = ip.ok_or_else(|| wrong(annotation, text, &rule))?;
            // Flannel writes 0.0.0.0 on a node without IPv4.
            if !ip.is_unspecified() {
                attrs.public_ip.set_ip(ip);
            }
        }
        let annotation = Annotation::BackendData(family);
        match node.annotations.get(annotation) {
            // Flannel's backends without data write `null`, and one of them an empty text.
            None | Some("" | "null") => {}
            Some(text) => {
                let data = BackendData::from_json(text);
                let data = data.map_err(|error| wrong(annotation, "…", &error.to_string()))?;
                attrs.backend_data.set(family, Some(data));
            }
        }
    }
    Ok(attrs)
}

/// A public address as Go flannel reads it: where it wants an IPv6 address, an IPv4 one becomes
/// IPv4-mapped.
fn public_ip(family: Family, text: &str) -> Option<IpAddr> {
    match (family, text.parse().ok()?) {
        (Family::V4, IpAddr::V4(ip)) => Some(IpAddr::V4(ip)),
        (Family::V4, IpAddr::V6(_)) => None,
        (Family::V6, IpAddr::V4(ip)) => Some(IpAddr::V6(ip.to_ipv6_mapped())),
        (Family::V6, IpAddr::V6(ip)) => Some(IpAddr::V6(ip)),
    }
}

/// What the annotations of a record are to be: those that [`Annotation::WRITTEN`] names, each with
/// its value or to be absent.
pub type Wanted = BTreeMap<Annotation, Option<String>>;

/// The annotations of a node that publishes these attributes, as Go flannel writes them. Where an
/// operator has set an overwrite on the Node, that address is published instead of the node's own.
///
/// # Errors
/// The name of an overwrite whose value is no address, and what is wrong with it.
pub fn wanted(node: &NodeView, attrs: &LeaseAttrs) -> Result<Wanted, String> {
    let mut wanted = absent();
    wanted.insert(Annotation::Managed, Some("true".to_owned()));
    let kind = attrs.backend_type.as_ref().map_or("", BackendType::as_str);
    wanted.insert(Annotation::BackendType, Some(kind.to_owned()));
    for family in Family::ALL {
        let mut ip = attrs.public_ip(family);
        let annotation = Annotation::Overwrite(family);
        let overwrite = node.annotations.get(annotation).unwrap_or_default();
        if !overwrite.is_empty() && ip.is_some() {
            ip = public_ip(family, overwrite).filter(|ip| !ip.is_unspecified());
            if ip.is_none() {
                let shown: String = overwrite.chars().take(64).collect();
                return Err(format!(
                    "{} = {shown:?}: must be an {family} address",
                    annotation.name()
                ));
            }
        }
        let data = attrs.backend_data.get(family).map(BackendData::as_json);
        // A family that is published without data has the data `null`, as Go's encoder has it.
        let data = data.or_else(|| ip.map(|_| "null"));
        wanted.insert(Annotation::PublicIp(family), ip.map(|ip| ip.to_string()));
        wanted.insert(Annotation::BackendData(family), data.map(str::to_owned));
    }
    Ok(wanted)
}

/// No record: every annotation that a node writes is absent.
pub fn absent() -> Wanted {
    Annotation::WRITTEN
        .map(|annotation| (annotation, None))
        .into()
}

/// How one annotation differs from what it is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Which one.
    pub annotation: Annotation,
    /// What is there.
    pub found: Option<String>,
    /// What is to be there.
    pub wanted: Option<String>,
}

/// What of a Node's annotations differs from what they are to be.
pub fn differences(node: &NodeView, wanted: &Wanted) -> Vec<Difference> {
    let differs = |(annotation, wanted): (&Annotation, &Option<String>)| {
        let found = node.annotations.get(*annotation);
        (found != wanted.as_deref()).then(|| Difference {
            annotation: *annotation,
            found: found.map(str::to_owned),
            wanted: wanted.clone(),
        })
    };
    wanted.iter().filter_map(differs).collect()
}

/// Whether a Node's condition `NetworkUnavailable` is to be written, and to what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// It is left as it is.
    Unsaid,
    /// Flannel runs.
    Up,
    /// Flannel was taken away.
    Down,
}

/// The patch (of the strategic kind, for `nodes/NAME/status`) that makes the differences good and
/// touches nothing else. It is refused unless the Node is the one that was read, and unchanged
/// since. `now` is the time for the condition, `None` leaves it out.
pub fn patch(
    node: &NodeView,
    prefix: &AnnotationPrefix,
    differences: &[Difference],
    network: Network,
    now: Option<&str>,
) -> Value {
    let mut metadata = Map::new();
    metadata.insert("uid".to_owned(), json!(node.uid));
    let version = node.revision.0.to_string();
    metadata.insert("resourceVersion".to_owned(), json!(version));
    if !differences.is_empty() {
        let annotations: Map<String, Value> = differences
            .iter()
            .map(|one| (prefix.key(one.annotation), json!(one.wanted)))
            .collect();
        metadata.insert("annotations".to_owned(), annotations.into());
    }
    let mut patch = json!({ "metadata": metadata });
    let (status, reason, message) = match network {
        Network::Unsaid => return patch,
        Network::Up => ("False", "FlannelIsUp", "Flannel is running on this node"),
        Network::Down => (
            "True",
            "FlannelIsGone",
            "Flannel was taken away from this node",
        ),
    };
    let mut condition = json!({
        "type": "NetworkUnavailable",
        "status": status,
        "reason": reason,
        "message": message,
    });
    if let Some(now) = now {
        condition["lastHeartbeatTime"] = json!(now);
        condition["lastTransitionTime"] = json!(now);
    }
    // Merged by type: all other conditions stay.
    patch["status"] = json!({ "conditions": [condition] });
    patch
}

/// The addresses that an operator has set on a Node for the program that runs there.
///
/// # Errors
/// The name of the annotation that is no address.
pub fn node_public_ip(node: &NodeView) -> Result<flannel_core::PublicIp, String> {
    let mut ips = flannel_core::PublicIp::default();
    for family in Family::ALL {
        let annotation = Annotation::NodePublicIp(family);
        let text = node.annotations.get(annotation).unwrap_or_default();
        if text.is_empty() {
            continue;
        }
        let ip = public_ip(family, text).filter(|ip| *ip != IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let Some(ip) = ip else {
            let shown: String = text.chars().take(64).collect();
            let name = annotation.name();
            return Err(format!("{name} = {shown:?}: must be an {family} address"));
        };
        ips.set_ip(ip);
    }
    Ok(ips)
}
