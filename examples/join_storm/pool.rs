//! The pool that the nodes lease from.

/// So many subnets of 256 addresses, one behind the other.
pub(crate) struct Pool {
    pub(crate) subnets: u32,
}

impl Pool {
    /// As many as there are from 10.1.0.0 on.
    pub(crate) const LARGEST: u32 = 255 << 8;

    pub(crate) fn new(wanted: Option<u32>, nodes: u32) -> Self {
        let roomy = (2 * nodes).next_power_of_two().min(Self::LARGEST);
        Self {
            subnets: wanted.unwrap_or(roomy),
        }
    }

    /// The network config of exactly this pool.
    pub(crate) fn config(&self) -> String {
        let last = (1 << 8) + self.subnets - 1;
        format!(
            r#"{{ "Network": "10.0.0.0/8", "SubnetLen": 24, "SubnetMin": "10.1.0.0", "SubnetMax": "10.{}.{}.0", "Backend": {{ "Type": "vxlan" }} }}"#,
            last >> 8,
            last & 0xff,
        )
    }
}
