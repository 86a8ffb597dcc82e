"""What `ksi bench` measures, and how: a real daemon process, a load generator in another, and this disk's own figures."""
