"""`python3 dev policy`: graphs sent to a real server with and without a policy, honest ones and attacks."""
