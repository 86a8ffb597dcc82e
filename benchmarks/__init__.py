"""What `ksi bench` measures, and how: a real daemon, a load generator in another process, and this disk's figures."""
