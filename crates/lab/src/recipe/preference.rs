//! The settings of preference training, by method: each has the defaults of its paper, and none takes another's.

use serde::{Deserialize, Serialize};

use super::settings::{check, setting};
use super::{Method, PreferenceRecipe, Recipe};
use crate::train::TrainError;

/// How preferences are learnt, with nothing left open.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "snake_case")]
pub enum PreferenceSettings {
    /// [`crate::train::preference::loss::dpo`]
    Dpo {
        /// How closely the policy is held to the reference.
        beta: f64,
    },
    /// [`crate::train::preference::loss::orpo`]
    Orpo {
        /// Weight of the odds ratio beside the likelihood.
        lambda: f64,
    },
    /// [`crate::train::preference::loss::kto`]
    Kto {
        /// How soon gains and losses saturate.
        beta: f64,
        /// Weight of desirable answers.
        desirable_weight: f64,
        /// Weight of undesirable answers.
        undesirable_weight: f64,
    },
    /// [`crate::train::preference::loss::simpo`]
    Simpo {
        /// Scale of the rewards.
        beta: f64,
        /// By how much the preferred answer should lead.
        gamma: f64,
    },
}

impl PreferenceSettings {
    /// Whether losses are relative to the model that the run began with.
    pub fn has_reference(&self) -> bool {
        matches!(self, Self::Dpo { .. } | Self::Kto { .. })
    }
}

impl Recipe {
    /// The settings of the method, if it learns preferences; refuses those of another method.
    pub(super) fn resolve_preference(&self) -> Result<Option<PreferenceSettings>, TrainError> {
        let method = self.method.unwrap_or_default();
        let PreferenceRecipe {
            beta,
            gamma,
            lambda,
            desirable_weight,
            undesirable_weight,
        } = self.preference;
        let fields = [
            ("preference.beta", beta),
            ("preference.gamma", gamma),
            ("preference.lambda", lambda),
            ("preference.desirable_weight", desirable_weight),
            ("preference.undesirable_weight", undesirable_weight),
        ];
        let own: &[&str] = match method {
            Method::Sft | Method::Full => &[],
            Method::Dpo => &["preference.beta"],
            Method::Simpo => &["preference.beta", "preference.gamma"],
            Method::Orpo => &["preference.lambda"],
            Method::Kto => &[
                "preference.beta",
                "preference.desirable_weight",
                "preference.undesirable_weight",
            ],
        };
        for (field, value) in fields {
            let Some(value) = value else { continue };
            if !own.contains(&field) {
                let has = match own {
                    [] => "which learns no preferences".to_string(),
                    own => format!("which has {}", quoted(own)),
                };
                let reason = format!(
                    "is no setting of `method = \"{}\"`, {has}; leave it out",
                    method.name()
                );
                return Err(setting(field, &reason));
            }
            // A weight of 0 leaves one kind of answers out, and a margin of 0 is none.
            let may_be_zero = field != "preference.beta";
            let fine = value.is_finite() && (value > 0.0 || may_be_zero && value == 0.0);
            let must = if may_be_zero {
                "must be 0 or more"
            } else {
                "must be above 0"
            };
            check(fine, field, must)?;
        }
        let beta_or = |usual: f64| beta.unwrap_or(usual);
        Ok(match method {
            Method::Sft | Method::Full => None,
            Method::Dpo => Some(PreferenceSettings::Dpo { beta: beta_or(0.1) }),
            Method::Orpo => Some(PreferenceSettings::Orpo {
                lambda: lambda.unwrap_or(0.1),
            }),
            Method::Kto => Some(PreferenceSettings::Kto {
                beta: beta_or(0.1),
                desirable_weight: desirable_weight.unwrap_or(1.0),
                undesirable_weight: undesirable_weight.unwrap_or(1.0),
            }),
            Method::Simpo => Some(PreferenceSettings::Simpo {
                beta: beta_or(2.0),
                gamma: gamma.unwrap_or(1.0),
            }),
        })
    }
}

fn quoted(fields: &[&str]) -> String {
    let quoted: Vec<String> = fields.iter().map(|field| format!("`{field}`")).collect();
    quoted.join(", ")
}
