"""The connector over the fake session, for real engines without the library: set `kv_connector_module_path` to this."""

from fake import FakeSession

import kvtier.connector
from kvtier import _native
from kvtier.connector import KvTierConnector as Real

kvtier.connector.Session = FakeSession
_native.library = lambda: None
_native.weights_digest = lambda path: f"fake {path}"


class KvTierConnector(Real):
    """Real but for its session."""
