pytest_plugins = ["tests.servers.fixtures", "tests.databases"]
