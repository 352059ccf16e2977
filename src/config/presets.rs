//! Holds what is compiled in: the defaults and the presets, in the form of a user's file.

use super::file::{Layer, Written};
use super::mistakes::{Mistakes, closest};

/// Every preset, by the name that `use` has for it.
const PRESETS: [(&str, &str); 1] = [("openai", include_str!("../../config/presets/openai.toml"))];

/// The lowest layer but the presets.
pub(super) fn defaults() -> Written {
    compiled_in("default", include_str!("../../config/default.toml"))
}

/// The presets that are in use, in their order. The highest layer that has `use` decides alone, so that
/// `use = []` switches all off. The second value is false when one is not known.
pub(super) fn chosen(layers: &[Layer], mistakes: &Mistakes) -> (Vec<Written>, bool) {
    let names = layers.iter().find_map(|layer| layer.presets.as_ref());
    let (mut chosen, mut all_known) = (Vec::new(), true);
    for name in names.into_iter().flatten() {
        match PRESETS.iter().find(|(known, _)| *known == name.value) {
            Some((known, text)) => chosen.push(compiled_in(&format!("preset {known}"), text)),
            None => {
                all_known = false;
                let known = PRESETS.map(|(known, _)| known);
                let hint = match closest(&name.value, known) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("there is: {}", known.join(", ")),
                };
                let message = format_args!("unknown preset `{}`", name.value);
                mistakes.add_with_hint(&name.place, message, Some(hint));
            }
        }
    }
    (chosen, all_known)
}

fn compiled_in(name: &str, text: &str) -> Written {
    Written {
        name: format!("compiled in: {name}"),
        folder: "".into(),
        text: text.to_owned(),
        is_own: false,
        is_managed: false,
    }
}
