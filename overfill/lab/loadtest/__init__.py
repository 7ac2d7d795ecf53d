"""Load tests with locust: what is asked, by how many, and whether the answers met their objectives. No torch."""
