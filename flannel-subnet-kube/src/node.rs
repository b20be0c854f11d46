//! [`NodeView`]: of a Node, what is of use to us. Everything else is dropped while it is decoded.

use std::collections::BTreeMap;

use flannel_core::{BackendData, DualStack, Revision, Subnet};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::prefix::{Annotation, AnnotationPrefix};

/// The longest annotation that is kept whole, in bytes. Of a longer one the beginning is kept, which
/// is then no value of that kind.
const LONGEST: usize = BackendData::MAX_LEN + 1;

/// The longest name of a Node, as Kubernetes has it.
const LONGEST_NAME: usize = 253;

/// How many pod CIDRs are looked at.
const MOST_CIDRS: usize = 4;

/// Flannel's annotations of a Node by their meaning, each at most 16 KiB and one byte long.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Annotations(BTreeMap<Annotation, Box<str>>);

impl Annotations {
    /// The value of one.
    pub fn get(&self, annotation: Annotation) -> Option<&str> {
        self.0.get(&annotation).map(|value| &**value)
    }

    /// Those that are there.
    pub fn iter(&self) -> impl Iterator<Item = (Annotation, &str)> {
        self.0
            .iter()
            .map(|(annotation, value)| (*annotation, &**value))
    }

    fn insert(&mut self, annotation: Annotation, value: &str) {
        let mut end = value.len().min(LONGEST);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        self.0.insert(annotation, value[..end].into());
    }
}

impl FromIterator<(Annotation, String)> for Annotations {
    fn from_iter<T: IntoIterator<Item = (Annotation, String)>>(values: T) -> Self {
        let mut annotations = Self::default();
        for (annotation, value) in values {
            annotations.insert(annotation, &value);
        }
        annotations
    }
}

/// What of a Node concerns us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// Its name: at most 253 bytes.
    pub name: Box<str>,
    /// Its identity: another Node of the same name has another one.
    pub uid: Box<str>,
    /// Its last write, whoever's it was.
    pub revision: Revision,
    /// When it was made, in seconds since 1970, by the API server's clock; the highest number if
    /// that is not known.
    pub created: u64,
    /// The subnets that were assigned to it, of each family the first; or why they cannot be used.
    pub subnets: Result<DualStack<Subnet>, String>,
    /// Flannel's annotations.
    pub annotations: Annotations,
    /// The condition `NetworkUnavailable`; `None` if there is none.
    pub network_unavailable: Option<bool>,
}

/// Why bytes are no Node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a Node: {reason}")]
pub struct NodeError {
    reason: String,
}

impl NodeError {
    fn new(reason: impl ToString) -> Self {
        Self {
            reason: reason.to_string(),
        }
    }
}

impl NodeView {
    /// Decodes a Node as the API server writes it.
    ///
    /// # Errors
    /// [`NodeError`] if it is no JSON of that form, or without name or version. Values that a user
    /// can write never are the cause.
    pub fn from_json(json: &[u8], prefix: &AnnotationPrefix) -> Result<Self, NodeError> {
        let raw: RawNode<'_> = serde_json::from_slice(json).map_err(NodeError::new)?;
        let RawMeta {
            name,
            uid,
            resource_version,
            creation_timestamp,
            annotations,
        } = raw.metadata;
        if name.is_empty() || name.len() > LONGEST_NAME {
            return Err(NodeError::new("it has no name"));
        }
        let revision = resource_version
            .parse()
            .map_err(|_| NodeError::new("its resourceVersion is no number"))?;
        let mut kept = Annotations::default();
        for (key, value) in annotations.unwrap_or_default() {
            // The value of another's annotation is not even decoded.
            if let Some(annotation) = prefix.annotation(&key)
                && let Ok(value) = serde_json::from_str::<String>(value.get())
            {
                kept.insert(annotation, &value);
            }
        }
        let conditions = raw.status.unwrap_or_default().conditions;
        let network_unavailable = conditions
            .unwrap_or_default()
            .into_iter()
            .find(|condition| condition.kind == "NetworkUnavailable")
            .map(|condition| condition.status != "False");
        Ok(Self {
            name: name.into(),
            uid: uid.into(),
            revision: Revision(revision),
            created: creation_timestamp
                .as_deref()
                .and_then(seconds)
                .unwrap_or(u64::MAX),
            subnets: subnets(&raw.spec.unwrap_or_default()),
            annotations: kept,
            network_unavailable,
        })
    }

    /// Whether two views of one Node differ in nothing but their version.
    pub(crate) fn same_content(&self, other: &Self) -> bool {
        // Named one by one, so that a new field is not forgotten.
        let Self {
            name,
            uid,
            revision: _,
            created,
            subnets,
            annotations,
            network_unavailable,
        } = self;
        (name, uid, created) == (&other.name, &other.uid, &other.created)
            && (subnets, annotations) == (&other.subnets, &other.annotations)
            && network_unavailable == &other.network_unavailable
    }
}

/// A Node's pod CIDRs by family: `podCIDRs`, or `podCIDR` where that list is empty.
fn subnets(spec: &RawSpec) -> Result<DualStack<Subnet>, String> {
    let list = spec.pod_cidrs.as_deref().unwrap_or_default();
    let one = spec.pod_cidr.as_slice();
    let cidrs = if list.is_empty() { one } else { list };
    let mut subnets = DualStack::default();
    for cidr in cidrs
        .iter()
        .filter(|cidr| !cidr.is_empty())
        .take(MOST_CIDRS)
    {
        let subnet: Subnet = cidr.parse().map_err(|_| {
            let shown: String = cidr.chars().take(64).collect();
            format!("spec.podCIDRs: {shown:?} is no network")
        })?;
        if subnet.len() == 0 {
            return Err(format!("spec.podCIDRs: {subnet} is every address there is"));
        }
        if !subnets.has(subnet.family()) {
            subnets.set(subnet.family(), Some(subnet));
        }
    }
    Ok(subnets)
}

/// The seconds since 1970 of a time as Kubernetes writes it: `2026-11-21T16:41:08Z`.
fn seconds(time: &str) -> Option<u64> {
    let (date, clock) = time.strip_suffix('Z')?.split_once('T')?;
    let three = |text: &str, by: char| -> Option<[u64; 3]> {
        let mut parts = text.split(by);
        let mut next = || parts.next()?.parse::<u64>().ok();
        let all = [next()?, next()?, next()?];
        parts.next().is_none().then_some(all)
    };
    let [year, month, day] = three(date, '-')?;
    // Fractions of a second, which Kubernetes does not write here, would not order claims.
    let [hour, minute, second] = three(clock.split('.').next()?, ':')?;
    if !(1970..10_000).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March, so that a leap day comes last.
    let (years, months) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * years + years / 4 - years / 100 + years / 400 + (153 * months + 2) / 5 + day;
    // From the first of March of the year 0 to the first of January of 1970.
    let days = days.checked_sub(719_469)?;
    (hour < 24 && minute < 60 && second < 61)
        .then_some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

#[derive(Deserialize)]
struct RawNode<'a> {
    #[serde(borrow)]
    metadata: RawMeta<'a>,
    spec: Option<RawSpec>,
    status: Option<RawStatus>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMeta<'a> {
    name: String,
    #[serde(default)]
    uid: String,
    resource_version: String,
    creation_timestamp: Option<String>,
    #[serde(borrow)]
    annotations: Option<BTreeMap<String, &'a RawValue>>,
}

#[derive(Deserialize, Default)]
struct RawSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
struct RawStatus {
    conditions: Option<Vec<RawCondition>>,
}

#[derive(Deserialize)]
struct RawCondition {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    status: String,
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (text, wanted) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("1970-03-01T00:00:01Z", Some(59 * 86_400 + 1)),
            ("2000-02-29T12:00:00Z", Some(951_825_600)),
            ("2000-03-01T00:00:00Z", Some(951_868_800)),
            ("2026-11-21T16:41:08Z", Some(1_795_279_268)),
            ("2026-11-21T16:41:08.5Z", Some(1_795_279_268)),
            ("1969-12-31T23:59:59Z", None),
            ("2026-13-01T00:00:00Z", None),
            ("2026-11-21T16:41:08+01:00", None),
            ("yesterday", None),
            ("", None),
        ] {
            assert_eq!(seconds(text), wanted, "{text}");
        }
    }
}
