"""Who is who: users, sign-ins, and which role each route needs."""
