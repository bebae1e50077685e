//! Who asks, and whether they may.
//!
//! `authn` finds the identity (client certificate, service account token), `rbac` decides, `token` signs and checks service
//! account tokens, `bootstrap` holds the default roles.

pub(crate) mod authn;
pub(crate) mod bootstrap;
pub(crate) mod rbac;
pub(crate) mod token;

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// An authenticated user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// User name, such as `system:serviceaccount:default:sleep`.
    pub username: String,
    /// Stable id; the uid of the service account, or empty.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// Further attributes, such as the pod a token is bound to.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Identity {
    /// A user of `system:masters`, who may do everything.
    pub fn admin(username: &str) -> Self {
        Self::user(username, &["system:masters"])
    }

    /// An authenticated user with groups.
    pub fn user(username: &str, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        groups.push("system:authenticated".into());
        Self {
            username: username.to_owned(),
            groups,
            ..Self::default()
        }
    }

    /// Nobody in particular.
    pub fn anonymous() -> Self {
        Self {
            username: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            ..Self::default()
        }
    }

    /// Whether this is nobody in particular.
    pub fn is_anonymous(&self) -> bool {
        self.username == "system:anonymous"
    }

    /// `UserInfo` of the authentication API.
    pub fn user_info(&self) -> Value {
        let mut v = json!({"username": self.username});
        if !self.uid.is_empty() {
            v["uid"] = self.uid.clone().into();
        }
        if !self.groups.is_empty() {
            v["groups"] = json!(self.groups);
        }
        if !self.extra.is_empty() {
            v["extra"] = json!(self.extra);
        }
        v
    }
}
