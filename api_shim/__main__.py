"""`python -m api_shim`: the API of this machine, as the settings say."""

import sys

from pydantic import ValidationError

from api_shim.server import serve
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.settings import load_settings


def main() -> None:
    try:
        serve(load_settings())
    except (BatchError, ValidationError) as failure:
        sys.exit(f"api: {failure}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
