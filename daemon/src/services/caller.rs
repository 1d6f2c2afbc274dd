//! Who calls: a verb's tenant comes from its caller's credentials, never from what the message says.

use std::sync::Arc;

use kvtier_types::TenantId;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use crate::config::Tenancy;
use crate::node::Node;

/// The caller of a verb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Whose blocks it may control; for operators, those of no tenant in particular.
    pub(crate) tenant: TenantId,
    /// Whether it may act for all tenants.
    pub(crate) operator: bool,
}

impl Caller {
    /// An operator: who runs the daemon, root, and whoever reaches the TCP control port.
    pub(crate) fn operator() -> Self {
        Self { tenant: TenantId::shared(), operator: true }
    }

    /// The caller of a request.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` for a user of this machine that the configuration lists neither as an operator nor as a tenant's.
    pub(crate) fn of<T>(node: &Arc<Node>, request: &Request<T>) -> Result<Self, Status> {
        let info = request.extensions().get::<UdsConnectInfo>();
        // Only the TCP control port has callers without one.
        let Some(info) = info else { return Ok(Self::operator()) };
        let peer = info.peer_cred.ok_or_else(|| Status::permission_denied("the system does not say who calls"))?;
        Self::of_uid(&node.tenancy, peer.uid()).ok_or_else(|| {
            Status::permission_denied(format!(
                "user {} is neither an operator nor of a tenant here: see operators.uids and tenants.uids of the configuration",
                peer.uid()
            ))
        })
    }

    /// As [`Self::of`], for what only operators may do.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` for all others.
    pub(crate) fn operator_of<T>(node: &Arc<Node>, request: &Request<T>) -> Result<Self, Status> {
        let caller = Self::of(node, request)?;
        if caller.operator {
            return Ok(caller);
        }
        Err(Status::permission_denied(format!("tenant {} may not do that: ask an operator", caller.tenant)))
    }

    fn of_uid(tenancy: &Tenancy, uid: u32) -> Option<Self> {
        if uid == 0 || uid == rustix::process::geteuid().as_raw() || tenancy.is_operator(uid) {
            return Some(Self::operator());
        }
        tenancy.of_uid(uid).map(|tenant| Self { tenant: tenant.clone(), operator: false })
    }

    /// The caller for what a message says is a tenant's: an operator takes that tenant's part and sees no more than it;
    /// others can name themselves only.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` for another tenant's, `INVALID_ARGUMENT` for what is no tenant.
    pub(crate) fn acting_for(&self, tenant: &str) -> Result<Self, Status> {
        if tenant.is_empty() {
            return Ok(self.clone());
        }
        let tenant = TenantId::new(tenant).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if !self.controls(&tenant) {
            return Err(Status::permission_denied(format!("only operators act for tenant {tenant}")));
        }
        Ok(Self { tenant, operator: false })
    }

    /// Whether it may control blocks of a tenant.
    pub(crate) fn controls(&self, tenant: &TenantId) -> bool {
        self.operator || self.tenant == *tenant
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn users_are_who_the_configuration_says() {
        let text =
            "[listen]\nsocket_mode = \"0666\"\n[operators]\nuids = [70001]\n[[tenants]]\nid = \"a\"\nuids = [70002]";
        let config: Config = toml::from_str(text).unwrap();
        let tenancy = config.tenancy().unwrap();
        let of = |uid| Caller::of_uid(&tenancy, uid);
        assert_eq!(of(0), Some(Caller::operator()));
        assert_eq!(of(rustix::process::geteuid().as_raw()), Some(Caller::operator()));
        assert_eq!(of(70001), Some(Caller::operator()));
        let tenant = of(70002).unwrap();
        let a = TenantId::new("a").unwrap();
        assert!(tenant.controls(&a) && !tenant.controls(&TenantId::shared()) && !tenant.operator);
        assert_eq!(of(70003), None);
    }
}
