"""An HTTP service on selfattn; see app.py."""
