//! The OpenAPI 3.1 description, generated from the handlers.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use crate::{
    accounts, agents, cluster, contacts, conversations, dead_letters, inboxes, keys, media, tenants,
};

struct Key;

impl Modify for Key {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let components = api.components.get_or_insert_with(Default::default);
        let scheme = HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .description(Some("The operator's key or a tenant's API key."))
            .build();
        components.add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Patchbay", description = "Conversations between businesses and their customers."),
    modifiers(&Key),
    paths(
        tenants::create,
        inboxes::put, inboxes::get, inboxes::list, inboxes::delete,
        accounts::put, accounts::get, accounts::list, accounts::delete, accounts::send, accounts::events,
        agents::put, agents::get, agents::list, agents::delete, agents::issue, agents::revoke,
        conversations::list, conversations::get, conversations::entries, conversations::send, conversations::note,
        conversations::assign, conversations::resolve, conversations::reopen, conversations::pending,
        conversations::snooze, conversations::tag, conversations::read,
        dead_letters::list, dead_letters::delete, dead_letters::replay,
        keys::create, keys::list, keys::delete, contacts::issue, media::put, media::get, cluster::nodes, cluster::shards, cluster::why, cluster::move_shard, cluster::plan, cluster::drain, cluster::undrain, cluster::backup,
    )
)]
struct Description;

/// The description as JSON.
pub fn description() -> String {
    Description::openapi().to_pretty_json().unwrap_or_default()
}

pub(crate) async fn serve() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], description()).into_response()
}
